"""Groups of patches for methods that merge the token stream: which merge, and the resulting rows."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.layout import Packing, TokenLayout

SMALL_GRID = 24
"""Patches; on a shorter side three patches are more than an eighth of the image, in Co-Me a twelfth."""

Scope = Literal["scene", "frame"]


def default_group(grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a group: 3 x 3, and 2 x 2 on grids with a side of fewer than 24 patches."""
    return (3, 3) if min(grid) >= SMALL_GRID else (2, 2)


def num_groups(grid: tuple[int, int], group: tuple[int, int]) -> tuple[int, int]:
    """Number of groups along both sides of a grid, including smaller ones at the edges."""
    return -(-grid[0] // group[0]), -(-grid[1] // group[1])


def group_means(
    conf: Tensor,  # [B, S, h, w]
    group: tuple[int, int],
) -> Tensor:  # [B, S, gh, gw]
    """Mean over every group."""
    means = F.avg_pool2d(conf.flatten(0, 1)[:, None], group, ceil_mode=True, count_include_pad=False)
    return means[:, 0].unflatten(0, conf.shape[:2])


def lowest(
    scores: Tensor,  # [B, S, gh, gw]
    share: float,
    scope: Scope,
) -> Tensor:  # [B, S, gh, gw], bool
    """Mark the lowest fraction of the groups that compete with each other; ties go to the first."""
    flat = scores.flatten(1 if scope == "scene" else 2)
    count = math.ceil(share * (flat.shape[-1] - 1) - 1e-9)  # those below the quantile; 0.3 * 10 is more than 3
    chosen = flat.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, chosen, True).view_as(scores)


def pack_groups(
    layout: TokenLayout,
    group: tuple[int, int],
    flags: Tensor,  # [B, S, gh, gw], bool
    *,
    weigh_keys: bool = True,
) -> Packing:
    """Pack every flagged group into one row, and every other token into its own.

    A frame's rows are its special tokens, then the groups row by row; an unmerged group gives its patches row by row.
    """
    rows = torch.arange(layout.grid[0], device=flags.device) // group[0]
    columns = torch.arange(layout.grid[1], device=flags.device) // group[1]
    group_of = (rows[:, None] * flags.shape[-1] + columns).flatten()  # [h * w]
    order = group_of.argsort(stable=True)
    group_of = group_of[order]
    first = F.pad(group_of[1:] != group_of[:-1], (1, 0), value=True)
    starts = ~flags.flatten(2)[..., group_of] | first  # [B, S, h * w], does a new row begin here?
    starts = F.pad(starts, (layout.num_special, 0), value=True)
    in_order = starts.flatten().cumsum(0).view_as(starts) - 1
    owner = in_order.clone()
    owner[..., layout.num_special + order] = in_order[..., layout.num_special :]
    return Packing.from_owner(owner, layout, weigh_keys=weigh_keys)
