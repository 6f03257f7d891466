"""Depth errors after one alignment per scene: AbsRel and delta < 1.25."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from geoaccel.alignment import as_float64
from geoaccel.errors import UserError
from geoaccel.eval.metrics.geometry import fit_scale, fit_scale_shift

Alignment = Literal["median", "least_squares", "scale_shift", "none"]


def valid_depth(
    gt: Tensor,  # [...]
    mask: Tensor | None = None,  # [...], bool
    *,
    min_depth: float = 0.0,
    max_depth: float = float("inf"),
) -> Tensor:  # [...], bool
    """Pixels with a usable ground truth: finite, inside ``(min_depth, max_depth)``, and in ``mask`` where given."""
    gt = as_float64(gt)
    valid = gt.isfinite() & (gt > min_depth) & (gt < max_depth)
    if mask is None:
        return valid
    mask = torch.as_tensor(mask).to(device="cpu", dtype=torch.bool)
    if mask.shape != gt.shape:
        raise ValueError(f"mask {list(mask.shape)} and depth {list(gt.shape)} differ in shape")
    return valid & mask


def depth_errors(
    pred: Tensor,  # [S, H, W] or any shape: all of one scene
    gt: Tensor,  # the same shape, in metres or any unit; not finite or <= 0 where unknown
    *,
    mask: Tensor | None = None,  # the same shape, bool
    align: Alignment = "median",
    min_depth: float = 0.0,
    max_depth: float = float("inf"),
) -> dict[str, float]:
    """AbsRel and delta < 1.25 of a scene, after one alignment for all of its pixels.

    Args:
        pred: Predicted z-depth.
        gt: True z-depth, which also determines the valid pixels.
        mask: Pixels to score; all by default.
        align: One scale for the scene, from the ratio of ``median`` depths or by ``least_squares``; least-squares
            ``scale_shift`` (of depth, not of disparity); or ``none`` for metric predictions. Tables of
            "scale-invariant" depth differ in exactly this choice, so report it.
        min_depth: Ground truth at or below it is not scored.
        max_depth: Ground truth at or above it is not scored.

    Returns:
        ``abs_rel``: mean of abs(pred - gt) / gt. ``delta_1_25``: fraction with max(pred / gt, gt / pred) below 1.25;
        a prediction that is not positive after alignment counts as wrong. The applied ``scale`` and ``shift``, and
        ``valid_pixels``.

    Raises:
        ValueError: If no pixel is valid, or if the prediction is not finite at a valid pixel.
    """
    pred, gt = as_float64(pred), as_float64(gt)
    if pred.shape != gt.shape:
        raise ValueError(f"pred {list(pred.shape)} and gt {list(gt.shape)} differ in shape: resize the prediction")
    valid = valid_depth(gt, mask, min_depth=min_depth, max_depth=max_depth)
    pred, gt = pred[valid], gt[valid]
    if len(gt) == 0:
        raise UserError("no valid depth: not one pixel with a finite ground truth in range and in the mask")
    if not pred.isfinite().all():
        count = int((~pred.isfinite()).sum())
        raise UserError(f"the predicted depth is NaN or infinite at {count} of {len(gt)} valid pixels")

    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if align == "scale_shift":
        scale, shift = fit_scale_shift(pred, gt)
    elif align in ("median", "least_squares"):
        scale = fit_scale(pred, gt, method=align)
    elif align != "none":
        raise UserError(f"align={align!r} is unknown. Known: median, least_squares, scale_shift, none")
    pred = scale * pred + shift
    within = (pred > 0) & (torch.maximum(pred / gt, gt / pred) < 1.25)
    return {
        "abs_rel": float(((pred - gt).abs() / gt).mean()),
        "delta_1_25": float(within.double().mean()),
        "scale": float(scale),
        "shift": float(shift),
        "valid_pixels": len(gt),
    }
