"""Attention on e4m3 codes in Triton, in one pass over the keys; its reference implementation is
:func:`geoaccel.kernels.fp8_reference.emulate`.

Tile sizes were not tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoaccel.kernels.fp8_reference import KEYS, WEIGHT_BITS, Operands, values
from geoaccel.kernels.rounding import to_e4m3

QUERIES = 128
"""Queries of a tile: two groups of four warps with 64 rows each, as Hopper's products want them."""

SMALLEST_DEPTH = 32
"""Channels that a product of 8-bit numbers sums over at least."""

NO_LOGIT = tl.constexpr(-float("inf"))


@triton.jit
def _flash_kernel(
    q,  # [rows, N, D], e4m3, or float32 where it is not NATIVE
    q_scale,  # [rows, N]
    k,  # [rows, M, D], as q
    k_scale,  # [rows, M]
    v,  # [rows, D, v_stride], as q
    v_scale,  # [rows, D]
    bias,  # [rows / heads or 1, M]
    out,  # [rows, N, D]
    n,
    m,
    dim,
    v_stride,
    heads,
    bias_stride,
    tiles,  # of the queries of a row
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # One axis: the others of CUDA's grid end at 65,535.
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    channels = tl.arange(0, TILE_D)
    in_q = (tokens[:, None] < n) & (channels[None, :] < dim)
    places = row * n * dim + tokens[:, None].to(tl.int64) * dim + channels[None, :]
    queries = tl.load(q + places, mask=in_q, other=0.0)
    scale = tl.load(q_scale + row * n + tokens, mask=tokens < n, other=0.0)
    top = tl.full([TILE_N], NO_LOGIT, tl.float32)
    total = tl.zeros([TILE_N], tl.float32)
    answer = tl.zeros([TILE_N, TILE_D], tl.float32)
    for start in range(0, m, TILE_M):
        others = start + tl.arange(0, TILE_M)
        in_k = (others[None, :] < m) & (channels[:, None] < dim)
        keys = tl.load(k + row * m * dim + others[None, :].to(tl.int64) * dim + channels[:, None], mask=in_k, other=0.0)
        key_scale = tl.load(k_scale + row * m + others, mask=others < m, other=0.0)
        logits = tl.dot(queries, keys, input_precision="ieee") * scale[:, None] * key_scale[None, :]
        if BIASED:
            shift = tl.load(bias + (row // heads) * bias_stride + others, mask=others < m, other=0.0)
            logits += shift[None, :]
        logits = tl.where(others[None, :] < m, logits, NO_LOGIT)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == NO_LOGIT, 0.0, higher)  # so that keys of no weight weigh 0, not NaN
        weights = tl.exp2(logits - base[:, None] + WEIGHT_BITS)
        if NATIVE:
            codes = weights.to(tl.float8e4nv)
            weights = codes.to(tl.float32)
        else:
            weights = to_e4m3(weights)
            codes = weights
        in_v = (others[:, None] < m) & (channels[None, :] < dim)
        members = row * dim * v_stride + channels[None, :].to(tl.int64) * v_stride + others[:, None]
        shrink = tl.exp2(top - base)
        # Added outside of the product: inside, Hopper would sum over all tiles with fewer bits than float32 has.
        answer = answer * shrink[:, None] + tl.dot(
            codes, tl.load(v + members, mask=in_v, other=0.0), input_precision="ieee"
        )
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
    channel_scale = tl.load(v_scale + row * dim + channels, mask=channels < dim, other=0.0)
    answer = answer / total[:, None] * channel_scale[None, :]
    tl.store(out + places, answer.to(out.dtype.element_ty), mask=in_q)


def flash(x: Operands, dtype: torch.dtype, *, native: bool = True) -> Tensor:  # [n, A, N, D]
    """Attention of every query to all keys.

    Args:
        x: Codes and scales.
        dtype: Of the output.
        native: False decodes the codes first and multiplies in float32, with the weights rounded by arithmetic: for
            Triton's interpreter, which neither multiplies nor rounds to eight-bit floats.
    """
    n, heads, tokens, dim = x.q.shape
    keys = x.k.shape[2]
    out = torch.empty(x.q.shape, dtype=dtype, device=x.q.device)
    q, k, v = (codes.contiguous() if native else values(codes).contiguous() for codes in (x.q, x.k, x.v))
    # Where there is no bias any pointer does.
    bias = x.q_scale if x.bias is None else x.bias.contiguous()
    shared = x.bias is None or x.bias.shape[0] == 1
    tiles = triton.cdiv(tokens, QUERIES)
    _flash_kernel[(tiles * n * heads,)](
        q,
        x.q_scale.contiguous(),
        k,
        x.k_scale.contiguous(),
        v,
        x.v_scale.contiguous(),
        bias,
        out,
        tokens,
        keys,
        dim,
        x.v.shape[3],
        heads,
        0 if shared else keys,
        tiles,
        x.bias is not None,
        native,
        WEIGHT_BITS,
        QUERIES,
        KEYS,
        max(SMALLEST_DEPTH, triton.next_power_of_2(dim)),
        num_warps=8,
    )
    return out
