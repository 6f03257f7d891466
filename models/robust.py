"""Robust estimates by weighted medians, which outliers hardly affect."""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.cameras import pixel_grid


def weighted_median(
    values: Tensor,  # [..., N]
    weights: Tensor,  # [..., N], not negative
) -> Tensor:  # [...]
    """The value with half of the weight on either side: the exact minimiser of ``sum w |v - m|``."""
    order = values.argsort(dim=-1)
    ordered = weights.gather(-1, order)
    if torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic cumsum of floats
        cumulative = ordered.cpu().cumsum(dim=-1).to(ordered.device)
    else:
        cumulative = ordered.cumsum(dim=-1)
    middle = torch.searchsorted(cumulative, cumulative[..., -1:] / 2).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, order).gather(-1, middle)[..., 0]


def recover_focal(
    points_cam: Tensor,  # [..., H, W, 3]
    conf: Tensor,  # [..., H, W], non-negative weights
) -> Tensor:  # [...]
    """Focal length in pixels for which camera points project onto their own pixels.

    The principal point is the image centre and pixels are square. Every pixel at distance u from the centre line gives
    f = u z / x; the result is the median over all pixels and both axes, weighted by confidence times |u|: pixels near
    the centre carry little information, and a median is robust to outliers.
    """
    height, width = points_cam.shape[-3:-1]
    offset = pixel_grid(height, width, device=points_cam.device) - points_cam.new_tensor([width / 2, height / 2])
    slope = points_cam[..., :2] / points_cam[..., 2:].clamp(min=1e-6)
    focal = (offset / torch.where(slope.abs() < 1e-6, 1e-6, slope)).flatten(-3)
    weight = (offset.abs() * conf[..., None]).flatten(-3)
    # An untrained network may give mostly negative ratios; a camera needs a positive focal length.
    return weighted_median(focal, weight).clamp(min=0.1 * max(height, width))
