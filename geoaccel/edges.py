"""Pixels at depth edges, where predicted depth blends object and background (flying pixels)."""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import UserError

EDGE_FILTER = 0.25
"""Chosen on rendered validation scenes (``scripts/figures/measure_edges.py``): for two small networks it removes a
fifth of the points that are off by over 10 %, and under 5 % of all points."""
LEAST_JUMP = 0.001
"""Below this, every pixel of a real surface is an edge."""
UNSURE = 1 / 6
"""Fraction of the pixels, the least confident ones, for which smaller jumps also count as an edge."""


def check_edge_filter(jump: float | None) -> None:
    """Refuse an invalid relative jump."""
    number = isinstance(jump, Real) and not isinstance(jump, bool)
    if jump is not None and not (number and math.isfinite(jump) and jump >= LEAST_JUMP):
        raise UserError(
            f"edge_filter={jump!r} is not allowed; give the relative jump of depth that counts as an edge, "
            f"{LEAST_JUMP} or more: try {EDGE_FILTER}"
        )


def depth_edges(
    depth: Tensor,  # [S, H, W]
    mask: Tensor,  # [S, H, W] bool
    jump: float,
    conf: Tensor | None = None,  # [S, H, W]
) -> Tensor:  # [S, H, W] bool
    """Pixels in whose 3 x 3 neighbourhood the farthest depth exceeds the nearest by more than the fraction `jump`.

    A surface seen at a grazing angle is also an edge, if its depth changes that fast from pixel to pixel.

    Args:
        depth: z-depth.
        mask: Pixels with valid depth; others are ignored and never edges.
        jump: Fraction of the nearest depth.
        conf: Confidence, of which only the order matters: among the least confident `UNSURE` of the pixels the
            threshold is lower, in proportion to their rank. None: all are equally confident.

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
    """The relative jump of depth around each pixel, scaled up at low confidence: above `jump` it is a depth edge.

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
    # The rank of pixels outside of the mask may be 0.
    return jumps / (rank / UNSURE).clamp(min=1e-9, max=1.0)
