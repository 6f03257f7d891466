"""The similarity between two windows, from the point maps of the frames that both have seen.

Every pixel of a shared frame has a point in each of the two worlds. They are fitted by iteratively reweighted least
squares with Huber's weights (Huber 1964), each point weighted by how sure both windows are of it, and its distance from
its partner taken relative to its depth: what a network says of far points is wrong by more.

Differs from VGGT-Long (Deng et al. 2025) in: points that are far off count nothing at the end, since many that are
wrong in one direction pull at Huber's weights all the same; confidences count by their rank within a window, since only
their order means the same for every backbone; distances are relative to depth, and where Huber's weights begin to fall
is measured on the distances themselves; how many points agree decides whether windows are joined at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.alignment import Similarity, as_float64, umeyama
from geoaccel.errors import UserError
from geoaccel.models.robust import weighted_median

MOST_POINTS = 20_000
"""Of all shared frames together: more are thinned to every so many."""
ROUNDS = 15
"""Of reweighting; it ends before where nothing moves."""
HUBER = 1.345
"""Standard deviations at which Huber's weights begin to fall, as is usual."""
WRONG = 4.0
"""Standard deviations from which a point does not count at all."""
LEAST_SURE = 0.3
"""Share of the points of a window that are not used: the least sure ones, as in the point cloud."""
TOLERANCE = 0.1
"""Points agree if they are no further apart than this share of their depth."""
FEWEST = 50
"""Points below which nothing is fitted."""
STILL = 1e-9


@dataclass(frozen=True)
class Fit:
    """How one window lies in the world of another.

    Attributes:
        similarity: From the world of the source into that of the target.
        agreement: Share of the points that agree, in [0, 1], by weight.
        spread: Their median distance relative to depth, by weight.
        points: How many were compared.
    """

    similarity: Similarity
    agreement: float
    spread: float
    points: int


def fit_maps(
    source: Tensor,  # [F, H, W, 3], world points of the shared frames in the window that is to be moved
    target: Tensor,  # [F, H, W, 3], of the same pixels in the other window
    source_weights: Tensor,  # [F, H, W], as `Window.weights` gives them
    target_weights: Tensor,  # [F, H, W]
    target_depth: Tensor,  # [F, H, W]
    *,
    with_scale: bool = True,
) -> Fit | None:
    """Fit one window to another; None where too few points are sure in both.

    Args:
        source: To be moved.
        target: Where it should land.
        source_weights: 0 leaves a pixel out.
        target_weights: The same.
        target_depth: Distances are taken relative to it.
        with_scale: False where both windows have the same unit: the scale is 1.
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
        except UserError as error:  # nothing but what the network predicted went in
            raise ValueError(str(error)) from error
        distance = (similarity.apply_points(source) - target).norm(dim=-1) / depth
        deviation = max(1.4826 * float(weighted_median(distance, weights)), STILL)
        if before is not None and (similarity.matrix() - before).abs().max() < STILL:
            break
        before = similarity.matrix()
        # The first rounds, by absolute distances, find the points that agree from far away.
        knee = (0.1 if turn < 5 else HUBER) * deviation
        robust = knee / distance.clamp(min=knee)
        if turn >= 5:
            robust = robust.where(distance < WRONG * deviation, 0.0)
    return similarity, distance
