"""Queries and keys of an attention in Triton: the norm of every head and the rotary embedding, in one pass.

torch spells them as two norms and a dozen operations on quarters of a head, each of which reads and writes all queries
or all keys. Here both are read once where the projection left them, and written once, one head after the other, as
attention and merging read them.

The reference implementation is :func:`geoaccel.kernels.twins.rotate_heads`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 32
"""Heads of tokens that a program takes: with 64 channels as many numbers as four warps hold in a few registers."""


@triton.jit
def _rotate_kernel(
    qkv,  # [n * N, 3, A, D]
    q_weight,  # [D]
    q_bias,  # [D]
    k_weight,  # [D]
    k_bias,  # [D]
    cos,  # [L, D / 2]
    sin,  # [L, D / 2]
    q_out,  # [n, A, N, D]
    k_out,  # [n, A, N, D]
    rows,  # n * N * A
    heads,
    length,  # N
    period,  # L
    quarter,  # D / 4
    qkv_stride,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    row = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R).to(tl.int64)
    token, head = row // heads, row % heads
    pair = tl.arange(0, TILE_C)
    # Channel i of a half is rotated together with channel i + D / 4.
    first = pair // quarter * 2 * quarter + pair % quarter
    inside = (row[:, None] < rows) & (pair[None, :] < 2 * quarter)
    channels = pair < 2 * quarter
    dim = 4 * quarter
    places = ((token // length * heads + head) * length + token % length)[:, None] * dim + first[None, :]
    if ROTATE:
        angle = (token % period)[:, None] * 2 * quarter + pair[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    for which in tl.static_range(2):
        start = qkv + (token * qkv_stride + (which * heads + head) * dim)[:, None] + first[None, :]
        a = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(start + quarter, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            if which == 0:
                weight, bias = q_weight, q_bias
            else:
                weight, bias = k_weight, k_bias
            mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1)) / dim
            a = tl.where(inside, a - mean[:, None], 0.0)
            b = tl.where(inside, b - mean[:, None], 0.0)
            variance = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / dim
            scale = (1.0 / tl.sqrt(variance + eps))[:, None]
            a = a * scale * tl.load(weight + first, mask=channels, other=0.0).to(tl.float32)[None, :]
            a += tl.load(bias + first, mask=channels, other=0.0).to(tl.float32)[None, :]
            b = b * scale * tl.load(weight + first + quarter, mask=channels, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias + first + quarter, mask=channels, other=0.0).to(tl.float32)[None, :]
        if ROTATE:
            a, b = a * c - b * s, b * c + a * s
        out = q_out if which == 0 else k_out
        tl.store(out + places, a.to(out.dtype.element_ty), mask=inside)
        tl.store(out + places + quarter, b.to(out.dtype.element_ty), mask=inside)


def rotate_heads(
    qkv: Tensor,  # [n, N, 3, A, D]
    q_norm: tuple[Tensor, Tensor] | None,  # [D] each
    k_norm: tuple[Tensor, Tensor] | None,  # [D] each
    eps: float,
    rope: tuple[Tensor, Tensor] | None,  # [L, 2, D / 4] each
) -> tuple[Tensor, Tensor]:  # [n, A, N, D] each
    """Queries and keys, normed and rotated in float32 and rounded once.

    Args:
        qkv: As the projection gives them; D is a multiple of 4.
        q_norm, k_norm: Weight and bias of the norms over a head's channels; both None for none.
        eps: Of both norms.
        rope: Cosines and sines of each token's angles; L tokens that repeat until there are N. None for no rotation.
    """
    batch, length, _, heads, dim = qkv.shape
    qkv = qkv.contiguous()
    q, k = (torch.empty(batch, heads, length, dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    rows = batch * length * heads
    if rows:
        # Where there are no norms or angles any pointer does.
        norms = (*(q_norm or (qkv, qkv)), *(k_norm or (qkv, qkv)))
        tables = (qkv, qkv) if rope is None else tuple(table.contiguous() for table in rope)
        period = 1 if rope is None else len(rope[0])
        _rotate_kernel[(triton.cdiv(rows, TILE_ROWS),)](
            qkv,
            *norms,
            *tables,
            q,
            k,
            rows,
            heads,
            length,
            period,
            dim // 4,
            3 * heads * dim,
            eps,
            q_norm is not None,
            rope is not None,
            TILE_ROWS,
            triton.next_power_of_2(dim // 2),
        )
    return q, k
