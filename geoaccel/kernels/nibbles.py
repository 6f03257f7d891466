"""Decoding 4-bit weights in Triton: half a byte is read and one narrow weight written, once.

torch spells the same arithmetic in six passes, most of them over float32, that move some 23 bytes a weight where 2.5
would do.

Products on the codes themselves, as torchao has them for Hopper, are not used. They win where a product waits for its
weights, at a few rows; a reconstruction multiplies thousands of tokens and waits for arithmetic. Their layouts are also
tied to one kind of device, so the weights would be kept twice.

The reference implementation is :meth:`geoaccel.quantization.formats.w4.W4Linear.dequantize` on other devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 8
TILE_BYTES = 128
"""Packed bytes of a tile; it writes twice as many weights."""


@triton.jit
def _decode_kernel(
    packed,  # [rows, width], uint8
    scale,  # [rows, groups]
    zero,  # [rows, groups]
    out,  # [rows, inputs]
    rows,
    width,
    groups,
    inputs,
    group_bytes,
    TILE_R: tl.constexpr,
    TILE_B: tl.constexpr,
):
    row = (tl.program_id(0) * TILE_R + tl.arange(0, TILE_R))[:, None]
    place = (tl.program_id(1) * TILE_B + tl.arange(0, TILE_B))[None, :]
    inside = (row < rows) & (place < width)
    both = tl.load(packed + row.to(tl.int64) * width + place, mask=inside, other=0)
    group = row.to(tl.int64) * groups + place // group_bytes
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    start = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
    even = (both & 15).to(tl.float32) * step + start
    odd = (both >> 4).to(tl.float32) * step + start
    column = (tl.program_id(1) * 2 * TILE_B + tl.arange(0, 2 * TILE_B))[None, :]
    weight = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * inputs + column, weight, mask=(row < rows) & (column < inputs))


def decode_groups(
    packed: Tensor,  # [N, ceil(K / 2)] uint8, the even input in the low half of a byte
    scale: Tensor,  # [N, G]
    zero: Tensor,  # [N, G]
    inputs: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """``code * scale + zero`` in float32, rounded once.

    Args:
        packed: Codes, two a byte.
        scale: A step for each group of inputs of a row; G = ceil(K / group_size).
        zero: The weight of code 0.
        inputs: K.
        group_size: Even, so that both codes of a byte share a group.
        dtype: Of the output.
    """
    rows, width = packed.shape
    out = torch.empty(rows, inputs, dtype=dtype, device=packed.device)
    if out.numel():
        grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(width, TILE_BYTES))
        packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
        groups, half = scale.shape[1], group_size // 2
        _decode_kernel[grid](packed, scale, zero, out, rows, width, groups, inputs, half, TILE_ROWS, TILE_BYTES)
    return out
