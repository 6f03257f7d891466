"""Attention on e4m3 codes: operands of the two products, and the reference implementation, in float32.

:mod:`geoaccel.kernels.fp8` says what is computed; :func:`geoaccel.kernels.fp8_flash.flash` does it in Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.kernels.e4m3 import E4M3, E4M3_MAX, SMALLEST_SCALE, UNIT, in_units

WEIGHT_BITS = 8
"""Weights are at most 2^8 before they are rounded: a power of two within e4m3's range, so that scaling is exact."""

KEYS = 64
"""Keys of a tile. What a weight is rounded to depends on the tiles before it, so every implementation has the same."""

QUERIES = 1024
"""Queries of one sequence and head that the emulation holds logits of."""

MULTIPLE = 16
"""Rows of codes are as many bytes apart: hardware loads want it."""


@dataclass(frozen=True)
class Operands:
    """Operands of the two products.

    Attributes:
        q: [n, A, N, D] e4m3.
        q_scale: [n, A, N].
        k: [n, A, M, D] e4m3.
        k_scale: [n, A, M], times log2(e) D^-1/2: logits are of base 2.
        v: [n, A, D, M'] e4m3, keys last as the product wants them, with zeros to a multiple of ``MULTIPLE``.
        v_scale: [n, A, D].
        bias: [n or 1, M], of base 2; None for none.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    bias: Tensor | None


def round_operands(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    bias: Tensor | None,  # [n or 1, M]
) -> Operands:
    """Codes and scales; a token or channel with NaN or infinity has no scale and makes NaN of its outputs."""
    v = F.pad(v.transpose(-1, -2), (0, -v.shape[2] % MULTIPLE))
    rounded = []
    for x in (q, k, v):
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST_SCALE)
        scale = scale.masked_fill(scale.isinf(), math.nan)
        rounded += [(x.float() / scale).to(E4M3), scale[..., 0]]
    q, q_scale, k, k_scale, v, v_scale = rounded
    k_scale = k_scale * (math.log2(math.e) * q.shape[-1] ** -0.5)
    return Operands(q, q_scale, k, k_scale, v, v_scale, None if bias is None else bias.float() * math.log2(math.e))


def emulate(x: Operands) -> Tensor:  # [n, A, N, D] float32
    """Attention by products in float32: the reference implementation of every kernel on these codes."""
    k, v = values(x.k).transpose(-1, -2), values(x.v).transpose(-1, -2)
    parts = zip(values(x.q).split(QUERIES, 2), x.q_scale[..., None].split(QUERIES, 2), strict=True)
    outputs = []
    for q, q_scale in parts:
        top = q.new_full((*q.shape[:3], 1), -math.inf)
        total, out = torch.zeros_like(top), torch.zeros_like(q)
        for start in range(0, x.k.shape[2], KEYS):
            keys = slice(start, min(start + KEYS, x.k.shape[2]))
            logits = (q @ k[..., keys]) * q_scale * x.k_scale[:, :, None, keys]
            if x.bias is not None:
                logits = logits + x.bias[:, None, None, keys]
            higher = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
            base = higher.masked_fill(higher == -math.inf, 0)  # so that keys of no weight weigh 0, not NaN
            weights = values((logits - base + WEIGHT_BITS).exp2().to(E4M3))
            shrink = (top - base).exp2()
            out = out * shrink + weights @ v[:, :, keys]
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            top = higher
        outputs.append(out / total * x.v_scale[:, :, None])
    return torch.cat(outputs, dim=2)


def values(codes: Tensor) -> Tensor:
    """e4m3 codes decoded to float32; NaN becomes 480 here, and is restored by its scale."""
    return in_units(codes) * UNIT
