"""Matching and segment means in Triton: the largest similarity of every token, and means of groups, in one pass each.

torch's way of matching writes every similarity to memory and reads it back for the largest. Here a tile of similarities
lives in registers from the matrix product to the comparison. A mean reads each member once, through its index, where a
gathered copy would read and write it once more.

The reference implementations, used on other devices, are :func:`geoaccel.similarity.best_match` and
:meth:`geoaccel.plan.MergePlan.merge`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Source tokens, target tokens and channels of a tile."""

NO_SCORE = tl.constexpr(-float("inf"))


@triton.jit
def _match_kernel(
    source,  # [rows, n, D]
    target,  # [rows, m, D]
    best,  # [rows, n], float32
    where,  # [rows, n], int64
    n,
    m,
    dim,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TILE_N
    tokens = first + tl.arange(0, TILE_N)
    source_rows = source + row * n * dim + tokens[:, None].to(tl.int64) * dim
    highest = tl.full([TILE_N], NO_SCORE, tl.float32)
    index = tl.zeros([TILE_N], tl.int64)
    for start in range(0, m, TILE_M):
        others = start + tl.arange(0, TILE_M)
        target_rows = target + row * m * dim + others[None, :].to(tl.int64) * dim
        similarity = tl.zeros([TILE_N, TILE_M], tl.float32)
        for channel in range(0, dim, TILE_D):
            channels = channel + tl.arange(0, TILE_D)
            in_a = (tokens[:, None] < n) & (channels[None, :] < dim)
            in_b = (others[None, :] < m) & (channels[:, None] < dim)
            a = tl.load(source_rows + channels[None, :], mask=in_a, other=0.0)
            b = tl.load(target_rows + channels[:, None], mask=in_b, other=0.0)
            similarity = tl.dot(a, b, similarity, input_precision="ieee")
        similarity = tl.where(others[None, :] < m, similarity, NO_SCORE)
        score, place = tl.max(similarity, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # Strictly higher: of equal targets the one with the lower index stays.
        better = score > highest
        highest = tl.where(better, score, highest)
        index = tl.where(better, (start + place).to(tl.int64), index)
    tl.store(best + row * n + tokens, highest, mask=tokens < n)
    tl.store(where + row * n + tokens, index, mask=tokens < n)


def best_match(
    source: Tensor,  # [rows, n, D]
    target: Tensor,  # [rows, m, D]
) -> tuple[Tensor, Tensor]:  # [rows, n] float32, [rows, n] int64
    """Largest dot product with, and index of, the best target of every source token.

    Products are summed in float32 and compared there, so that near-ties of narrow dtypes may fall otherwise than in the
    reference, which rounds before it compares.

    Args:
        source: Unit vectors.
        target: Unit vectors to choose from, at least one, in the same dtype.
    """
    rows, n, dim = source.shape
    best = torch.empty(rows, n, dtype=torch.float32, device=source.device)
    where = torch.empty(rows, n, dtype=torch.int64, device=source.device)
    if best.numel():
        grid = (triton.cdiv(n, TILE), rows)
        source, target, tile = source.contiguous(), target.contiguous(), min(TILE, _width(dim))
        _match_kernel[grid](source, target, best, where, n, target.shape[1], dim, TILE, TILE, tile)
    return best, where


@triton.jit
def _mean_kernel(
    x,  # [tokens, C]
    members,  # [tokens], int64
    starts,  # [groups], int64
    counts,  # [groups], int64
    out,  # [groups, C]
    width,
    TILE_C: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channels < width
    start = tl.load(starts + group)
    count = tl.load(counts + group)
    total = tl.zeros([TILE_C], tl.float32)
    for place in range(0, count):
        token = tl.load(members + start + place)
        total += tl.load(x + token * width + channels, mask=inside, other=0.0).to(tl.float32)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + group * width + channels, mean.to(out.dtype.element_ty), mask=inside)


def segment_mean(
    x: Tensor,  # [tokens, C]
    members: Tensor,  # [tokens], int64
    starts: Tensor,  # [groups], int64
    counts: Tensor,  # [groups], int64
) -> Tensor:  # [groups, C]
    """Mean of every group, summed in float32 in the order of its members; zeros for empty groups.

    Args:
        x: Tokens.
        members: All tokens in the order of their groups.
        starts: Where each group begins among the members.
        counts: Tokens of each group.
    """
    out = torch.empty(len(starts), x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        tile = min(256, _width(x.shape[1]))
        grid = (len(starts), triton.cdiv(x.shape[1], tile))
        _mean_kernel[grid](x.contiguous(), members, starts, counts, out, x.shape[1], tile)
    return out


def _width(dim: int) -> int:
    """A tile that Triton takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))
