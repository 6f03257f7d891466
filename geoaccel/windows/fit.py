"""The similarity transform between two windows, from the point maps of their shared frames.

Every pixel of a shared frame has a point in each of the two worlds. These are fitted by iteratively reweighted least
squares with Huber weights (Huber 1964), each point weighted by its confidence in both windows, with residuals relative
to depth, as predictions of far points have larger errors.

Differs from VGGT-Long (Deng et al. 2025) in: outliers get zero weight at the end, since many errors in one direction
bias a Huber fit; confidences are replaced by their rank within a window, since only their order is comparable across
backbones; residuals are relative to depth, and the Huber threshold is estimated from the residuals; the fraction of
agreeing points decides whether windows are joined at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.alignment import Similarity, as_float64, umeyama
from geoaccel.errors import UserError
from geoaccel.models.robust import weighted_median

MOST_POINTS = 20_000
"""Most points over all shared frames; more are subsampled."""
ROUNDS = 15
"""Most rounds of reweighting; stops earlier on convergence."""
HUBER = 1.345
"""Huber threshold in standard deviations, the usual value."""
WRONG = 4.0
"""Standard deviations from which a point has zero weight."""
LEAST_SURE = 0.3
"""Fraction of the points of a window that are not used: the least confident ones, as in the point cloud."""
TOLERANCE = 0.1
"""Points agree if their distance is at most this fraction of their depth."""
FEWEST = 50
"""Least number of points for a fit."""
STILL = 1e-9


@dataclass(frozen=True)
class Fit:
    """Alignment of one window to another.

    Attributes:
        similarity: From the world of the source to that of the target.
        agreement: Weighted fraction of the points that agree, in [0, 1].
        spread: Weighted median of their distance relative to depth.
        points: Number of points compared.
    """

    similarity: Similarity
    agreement: float
    spread: float
    points: int


def fit_maps(
    source: Tensor,  # [F, H, W, 3], world points of the shared frames in the window to be aligned
    target: Tensor,  # [F, H, W, 3], of the same pixels in the other window
    source_weights: Tensor,  # [F, H, W], as `Window.weights` gives them
    target_weights: Tensor,  # [F, H, W]
    target_depth: Tensor,  # [F, H, W]
    *,
    with_scale: bool = True,
) -> Fit | None:
    """Fit one window to another; None if too few points are confident in both.

    Args:
        source: Points to transform.
        target: Corresponding points.
        source_weights: 0 excludes a pixel.
        target_weights: The same.
        target_depth: Distances are relative to it.
        with_scale: False if both windows have the same unit: then the scale is 1.
    """
    weights = (source_weights * target_weights).sqrt()
    used = ((weights > 0) & (target_depth > 0)).nonzero(as_tuple=True)
    count = len(used[0])
    if count < FEWEST:
        return None
    step = -(-count // MOST_POINTS)
    rows = tuple(index[::step] for index in used)
    moved, fixed = as_float64(source[rows]), as_float64(target[rows])
    weights, depth = as_float64(weights[rows]), as_float64(target_depth[rows])
    similarity, distance = _reweighted(moved, fixed, weights, depth, with_scale)
    agreement = float(weights[distance < TOLERANCE].sum() / weights.sum())
    return Fit(similarity, agreement, float(weighted_median(distance, weights)), len(depth))


def _reweighted(
    source: Tensor,  # [N, 3]
    target: Tensor,  # [N, 3]
    weights: Tensor,  # [N]
    depth: Tensor,  # [N]
    with_scale: bool,
) -> tuple[Similarity, Tensor]:  # and [N], distances relative to depth
    robust = torch.ones_like(weights)
    base = weights / depth.square()
    before = None
    for turn in range(ROUNDS):
        try:
            similarity = umeyama(source, target, with_scale=with_scale, weights=base * robust)
        except UserError as error:  # the input is predictions only, not the user's
            raise ValueError(str(error)) from error
        distance = (similarity.apply_points(source) - target).norm(dim=-1) / depth
        deviation = max(1.4826 * float(weighted_median(distance, weights)), STILL)
        if before is not None and (similarity.matrix() - before).abs().max() < STILL:
            break
        before = similarity.matrix()
        # The first rounds use absolute distances, which converge from farther away.
        knee = (0.1 if turn < 5 else HUBER) * deviation
        robust = knee / distance.clamp(min=knee)
        if turn >= 5:
            robust = robust.where(distance < WRONG * deviation, 0.0)
    return similarity, distance
