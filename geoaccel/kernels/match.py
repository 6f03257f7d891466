"""Matching and segment means in Triton: the largest similarity of every token, and means of groups, in one pass each.

torch's way of matching writes every similarity to memory and reads it back for the largest. Here a tile of similarities
lives in registers from the matrix product to the comparison. A mean reads each member once, through its index, where a
gathered copy would read and write it once more.

The reference implementations, used on other devices, are :func:`geoaccel.similarity.best_match` and
:meth:`geoaccel.plan.MergePlan.merge`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Source tokens, target tokens and channels of a tile; warps and stages. The first is for what is too small to try all.
CONFIGURATIONS = (
    (64, 64, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
)

TUNED_FROM = 1 << 31
"""Multiply-adds from which configurations are autotuned, once per number of channels and dtype in a process.
Not in float32: its products run without tensor cores, and large tiles of them take minutes to compile."""

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
    # One axis: the others of CUDA's grid end at 65,535.
    tiles = tl.cdiv(n, TILE_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    source_rows = source + row * n * dim + tokens[:, None].to(tl.int64) * dim
    highest = tl.full([TILE_N], NO_SCORE, tl.float32)
    index = tl.zeros([TILE_N], tl.int32)
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
        # Strictly higher: ties go to the target with the lower index.
        better = score > highest
        highest = tl.where(better, score, highest)
        index = tl.where(better, start + place, index)
    tl.store(best + row * n + tokens, highest, mask=tokens < n)
    tl.store(where + row * n + tokens, index.to(tl.int64), mask=tokens < n)


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
        m = target.shape[1]

        def grid(tile: dict[str, int]) -> tuple[int]:
            return (rows * triton.cdiv(n, tile["TILE_N"]),)

        given = (source.contiguous(), target.contiguous(), best, where, n, m, dim)
        if rows * n * m * dim >= TUNED_FROM and source.element_size() == 2:
            _tuned()[grid](*given)
        else:
            tile_n, tile_m, tile_d, num_warps, num_stages = CONFIGURATIONS[0]
            launch = _match_kernel[(rows * triton.cdiv(n, tile_n),)]
            launch(*given, tile_n, tile_m, min(tile_d, _width(dim)), num_warps=num_warps, num_stages=num_stages)
    return best, where


@functools.cache
def _tuned() -> Any:
    """The kernel in the fastest of its configurations; what does not fit into a device is left out by itself.

    Made when it is needed: the interpreter has no clock of a GPU.
    """
    configurations = [
        triton.Config({"TILE_N": n, "TILE_M": m, "TILE_D": d}, num_warps=warps, num_stages=stages)
        for n, m, d, warps, stages in CONFIGURATIONS
    ]
    return triton.autotune(configurations, key=["dim"])(_match_kernel)


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
        _mean_kernel[grid](x.contiguous(), members, starts, counts, out, x.shape[1], tile, num_warps=max(1, tile // 64))
    return out


def _width(dim: int) -> int:
    """A tile that Triton takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))
