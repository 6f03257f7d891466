"""Pixels at depth edges, where predicted depth runs from an object to what is behind it and points hang in the air."""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import UserError

EDGE_FILTER = 0.25
"""Chosen on rendered validation scenes (``scripts/figures/measure_edges.py``): of two small networks it leaves out a
fifth of the points that are off by over 10 %, and under 5 % of all."""
LEAST_JUMP = 0.001
"""Below it every pixel of a real surface is an edge."""
UNSURE = 1 / 6
"""Share of the pixels, the least sure ones, of which smaller jumps make an edge, too."""


def check_edge_filter(jump: float | None) -> None:
    """Refuse what is no relative jump."""
    number = isinstance(jump, Real) and not isinstance(jump, bool)
    if jump is not None and not (number and math.isfinite(jump) and jump >= LEAST_JUMP):
        raise UserError(
            f"edge_filter={jump!r}; it is the relative jump of depth that makes an edge, {LEAST_JUMP} or more: "
            f"try {EDGE_FILTER}"
        )


def depth_edges(
    depth: Tensor,  # [S, H, W]
    mask: Tensor,  # [S, H, W] bool
    jump: float,
    conf: Tensor | None = None,  # [S, H, W]
) -> Tensor:  # [S, H, W] bool
    """Pixels around which the farthest depth is more than `jump` beyond the nearest, among them and their neighbours.

    A surface that is seen at a grazing angle is an edge, too, once its depth grows that fast from pixel to pixel.

    Args:
        depth: z-depth.
        mask: Pixels whose depth means something; no others count, nor are they edges.
        jump: Share of the nearest depth.
        conf: Confidence, of which only the order counts: among the least sure `UNSURE` of the pixels the jump that
            makes an edge is smaller, in proportion to their rank. None: all are as sure.

    Raises:
        ValueError: If `jump` is not a positive number.
    """
    check_edge_filter(jump)
    return depth_jumps(depth, mask, conf) > jump


def depth_jumps(
    depth: Tensor,  # [S, H, W]
    mask: Tensor,  # [S, H, W] bool
    conf: Tensor | None = None,  # [S, H, W]
) -> Tensor:  # [S, H, W]
    """The relative jump of depth around each pixel, larger where it is unsure: those above one are `depth_edges`.

    0 outside of the mask.
    """
    far, near = (depth.masked_fill(~mask, unseen) for unseen in (-torch.inf, torch.inf))
    farthest = F.max_pool2d(far[:, None], 3, stride=1, padding=1)[:, 0]
    nearest = -F.max_pool2d(-near[:, None], 3, stride=1, padding=1)[:, 0]
    jumps = torch.where(mask, farthest / nearest - 1, 0.0)
    if conf is None or not mask.any():
        return jumps
    sorted_conf = conf[mask].sort().values
    rank = torch.searchsorted(sorted_conf, conf.contiguous(), right=True) / len(sorted_conf)
    # Of pixels outside of the mask the rank may be 0.
    return jumps / (rank / UNSURE).clamp(min=1e-9, max=1.0)
