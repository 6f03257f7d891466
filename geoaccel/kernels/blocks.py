"""HTTM's steps on every head in Triton: matching inside blocks of tokens, and distances from the means of groups.

Tokens are looked up through their index, once for a tile, where torch gathers a copy of them for every few blocks. All
blocks of all heads are one launch.

The reference implementations are :func:`geoaccel.kernels.twins.match_blocks` and
:func:`geoaccel.kernels.twins.deviation`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_SOURCES, TILE_TARGETS = 128, 64
TILE_TOKENS = 64

NO_SCORE = tl.constexpr(-float("inf"))


@triton.jit
def _match_blocks_kernel(
    x,  # [B, A, T, D], any strides but the last
    sources,  # [G, s], int64
    targets,  # [G, m], int64
    where,  # [B * A, G, s], int64
    batch_stride,
    head_stride,
    token_stride,
    heads,
    blocks,
    s,
    m,
    dim,
    tiles,  # of the sources of a block
    least_norm,
    TILE_S: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # One axis: the others of CUDA's grid end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    block = program // tiles % blocks
    row = program // tiles // blocks
    tokens = x + row // heads * batch_stride + row % heads * head_stride
    own = program % tiles * TILE_S + tl.arange(0, TILE_S)
    channels = tl.arange(0, TILE_D)
    source = tl.load(sources + block * s + own, mask=own < s, other=0)
    in_a = (own[:, None] < s) & (channels[None, :] < dim)
    a = tl.load(tokens + source[:, None] * token_stride + channels[None, :], mask=in_a, other=0.0)
    highest = tl.full([TILE_S], NO_SCORE, tl.float32)
    index = tl.zeros([TILE_S], tl.int32)
    for start in range(0, m, TILE_M):
        others = start + tl.arange(0, TILE_M)
        target = tl.load(targets + block * m + others, mask=others < m, other=0)
        in_b = (others[None, :] < m) & (channels[:, None] < dim)
        b = tl.load(tokens + target[None, :] * token_stride + channels[:, None], mask=in_b, other=0.0)
        wide = b.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, axis=0))
        # The source's own length is the same for all of its targets.
        similarity = tl.dot(a, b, input_precision="ieee") / tl.maximum(norm, least_norm)[None, :]
        similarity = tl.where(others[None, :] < m, similarity, NO_SCORE)
        score, place = tl.max(similarity, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # Strictly higher: of equal targets the one with the lower index stays.
        better = score > highest
        highest = tl.where(better, score, highest)
        index = tl.where(better, start + place, index)
    tl.store(where + (row * blocks + block) * s + own, index.to(tl.int64), mask=own < s)


def match_blocks(
    x: Tensor,  # [B, A, T, D]
    sources: Tensor,  # [G, s], int64
    targets: Tensor,  # [G, m], int64
    least_norm: float,
) -> Tensor:  # [B, A, G, s], int64
    """The place among the targets of its block of the one that each source is most like, by cosine, for each head.

    Products are of the tokens as they are, summed in float32: near-ties of narrow dtypes may fall otherwise than in
    the reference, which rounds unit vectors first.

    Args:
        x: Tokens.
        sources: Of every block, tokens that look for a target.
        targets: Of every block, tokens to choose from, at least one.
        least_norm: A shorter target counts as so long.
    """
    batch, heads, _, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    (blocks, s), m = sources.shape, targets.shape[1]
    where = torch.empty(batch, heads, blocks, s, dtype=torch.int64, device=x.device)
    if where.numel():
        tiles = triton.cdiv(s, TILE_SOURCES)
        _match_blocks_kernel[(batch * heads * blocks * tiles,)](
            x,
            sources.contiguous(),
            targets.contiguous(),
            where,
            *x.stride()[:3],
            heads,
            blocks,
            s,
            m,
            dim,
            tiles,
            least_norm,
            TILE_SOURCES,
            TILE_TARGETS,
            max(16, triton.next_power_of_2(dim)),
        )
    return where


@triton.jit
def _deviation_kernel(
    x,  # [B, A, T, D], any strides but the last
    group_of,  # [B * A, T], int64
    merged,  # [B * A, M, D]
    out,  # [B * A, T], float32
    batch_stride,
    head_stride,
    token_stride,
    heads,
    tokens,
    groups,
    dim,
    tiles,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    token = program % tiles * TILE_T + tl.arange(0, TILE_T)
    channels = tl.arange(0, TILE_D)
    inside = (token[:, None] < tokens) & (channels[None, :] < dim)
    start = x + row // heads * batch_stride + row % heads * head_stride
    own = tl.load(start + token[:, None] * token_stride + channels[None, :], mask=inside, other=0.0)
    group = tl.load(group_of + row * tokens + token, mask=token < tokens, other=0)
    mean = tl.load(merged + (row * groups + group)[:, None] * dim + channels[None, :], mask=inside, other=0.0)
    apart = mean.to(tl.float32) - own.to(tl.float32)
    tl.store(out + row * tokens + token, tl.sum(apart * apart, axis=1), mask=token < tokens)


def deviation(
    x: Tensor,  # [B, A, T, D]
    group_of: Tensor,  # [B, A, T], int64
    merged: Tensor,  # [B, A, M, D]
) -> Tensor:  # [B, A, T], float32
    """Squared distance of every token from the mean of its group."""
    batch, heads, tokens, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    if out.numel():
        tiles = triton.cdiv(tokens, TILE_TOKENS)
        _deviation_kernel[(batch * heads * tiles,)](
            x,
            group_of.contiguous(),
            merged.contiguous(),
            out,
            *x.stride()[:3],
            heads,
            tokens,
            merged.shape[2],
            dim,
            tiles,
            TILE_TOKENS,
            max(16, triton.next_power_of_2(dim)),
        )
    return out
