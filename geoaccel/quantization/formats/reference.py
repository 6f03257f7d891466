"""Quantization and its inverse as pure functions: the reference implementation that the layers are tested against.

uint4 codes are asymmetric: code q of a group represents ``q * scale + zero``, where ``zero`` is the group's smallest
weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.kernels.e4m3 import SMALLEST_SCALE
from geoaccel.kernels.twins import quantize_rows as quantize_rows

UINT4_MAX = 15
# The range of float32 in half the bits: the scale of a group may be anything that its weights may be.
GROUP_DTYPE = torch.bfloat16


def dequantize_rows(
    codes: Tensor,  # [R, K] e4m3
    scale: Tensor,  # [R, 1] float32
) -> Tensor:  # [R, K] float32
    return codes.float() * scale


def fp8_linear(
    x: Tensor,  # [R, K]
    codes: Tensor,  # [N, K] e4m3
    scale: Tensor,  # [N, 1] float32
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [R, N] float64
    """The output of a row-wise FP8 product, without further rounding."""
    rounded = dequantize_rows(*quantize_rows(x)).double()
    y = rounded @ dequantize_rows(codes, scale).double().T
    return y if bias is None else y + bias.double()


def quantize_groups(
    weight: Tensor,  # [N, K]
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, K] uint8 in 0..15, [N, G], [N, G]
    """Round groups of consecutive weights of a row to 4 bits, in 15 equal steps from the smallest to the largest.

    If the group size does not divide K, the last group of each row is shorter. Codes are chosen for the scale and zero
    as stored, after rounding.

    Returns:
        Codes, scales and zeros; G = ceil(K / group_size).
    """
    inputs = weight.shape[1]
    # Repeating the last weight changes neither the smallest nor the largest of its group.
    padding = weight[:, -1:].expand(-1, -inputs % group_size)
    groups = torch.cat([weight.float(), padding.float()], dim=1).unflatten(1, (-1, group_size))
    scale, zero = group_grid(groups)
    codes = group_codes(groups, scale.float()[..., None], zero.float()[..., None])
    return codes.flatten(1)[:, :inputs], scale, zero


def group_grid(
    groups: Tensor,  # [N, G, g]
) -> tuple[Tensor, Tensor]:  # [N, G], [N, G]
    """Scale and zero of groups of weights, as stored."""
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    zero = low.to(GROUP_DTYPE)
    # Rounded down, or the weights below it would have no code.
    zero = torch.where(zero.float() > low, torch.nextafter(zero, torch.full_like(zero, -torch.inf)), zero)
    return ((high - zero.float()) / UINT4_MAX).clamp(min=SMALLEST_SCALE).to(GROUP_DTYPE), zero


def group_codes(
    weight: Tensor,
    scale: Tensor,  # float32; it and the zero as broadcast to the weights
    zero: Tensor,
) -> Tensor:  # uint8 in 0..15
    """The nearest code of each weight."""
    return ((weight - zero) / scale).round().clamp(0, UINT4_MAX).to(torch.uint8)


def dequantize_groups(
    codes: Tensor,  # [N, K] uint8 in 0..15
    scale: Tensor,  # [N, G]
    zero: Tensor,  # [N, G]
    group_size: int,
) -> Tensor:  # [N, K] float32
    inputs = codes.shape[1]
    steps = scale.float().repeat_interleave(group_size, dim=1)[:, :inputs]
    return codes.float() * steps + zero.float().repeat_interleave(group_size, dim=1)[:, :inputs]


def pack_nibbles(
    codes: Tensor,  # [N, K] uint8 in 0..15
) -> Tensor:  # [N, ceil(K / 2)] uint8
    """Two codes per byte: the even one in the low half. For odd K the last high half is zero."""
    even, odd = F.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
    return even | (odd << 4)


def unpack_nibbles(
    packed: Tensor,  # [N, ceil(K / 2)] uint8
    inputs: int,
) -> Tensor:  # [N, K] uint8 in 0..15
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :inputs]
