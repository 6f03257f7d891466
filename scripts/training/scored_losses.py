"""Depth and confidence as they are scored: errors relative to the distance, confidence after one scale for the scene.

Losses in the unit of the scene drown in far ground. And an error that all pixels share tells none of them from another,
so that confidence learns what one scale leaves. Both are used while a whole network learns (``scored`` of
:class:`objectives.Weights`) and on finished ones (:mod:`refinement`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import Targets, gradient_loss


def relative_depth_losses(
    depth: Tensor,  # [B, S, H, W]
    conf: Tensor,  # [B, S, H, W], at least 1
    targets: Targets,
    *,
    alpha: float = 0.2,
) -> dict[str, Tensor]:
    """Depth and its confidence as they are scored: errors relative to the distance, confidence after one scale.

    Returns:
        ``loss_depth``, the relative error in the cameras' unit of length and that after the evaluators' scale, and the
        jumps in it; and ``loss_conf``, ``e c - alpha log c`` of the error that one scale for the scene leaves: what all
        pixels share tells none of them from another. Confidence moves no depth.
    """
    near, valid = nearness(targets), targets.valid
    error, left = ((depth - targets.depth).abs() * near)[valid], scaled_error(depth, targets)[valid]
    ratio, seen = (depth * near).flatten(0, 1)[..., None], valid.flatten(0, 1)
    edges = gradient_loss(ratio, seen.float()[..., None], seen)
    certainty = conf[valid]
    return {
        "loss_depth": error.mean() + left.mean() + 0.3 * edges,
        "loss_conf": (left.detach() * certainty - alpha * certainty.log()).mean(),
    }


def graded_confidence_loss(
    depth: Tensor,  # [B, S, H, W]
    logits: Tensor,  # [B, S, H, W]
    targets: Targets,
    *,
    half_right: float = 0.05,
) -> Tensor:
    """Cross-entropy of pi3's confidence with how right each point is: 1 without error, 1/2 at ``half_right``.

    The paper's threshold says of most points only that they are right.
    """
    right = 1 / (1 + scaled_error(depth, targets)[targets.valid].detach() / half_right)
    return F.binary_cross_entropy_with_logits(logits[targets.valid], right)


def nearness(targets: Targets) -> Tensor:  # [B, S, H, W]
    """One over the depth, 0 where there is none."""
    return torch.where(targets.valid, 1 / targets.depth.clamp(min=1e-3), 0.0)


def scaled_error(
    depth: Tensor,  # [B, S, H, W]
    targets: Targets,
) -> Tensor:  # [B, S, H, W]
    """Relative error of depth after each scene's ratio of median depths, the scale of the evaluators.

    Its gradient reaches depth through the scale, too. Depth that is right pixel by pixel, as often too large as too
    small, has a median that is not: the distances of a scene are skewed. An evaluator would blame every pixel for it.
    """
    pairs = zip(depth, targets.depth, targets.valid, strict=True)
    scale = torch.stack([truth[valid].median() / smooth_median(own[valid]) for own, truth, valid in pairs])
    return (scale[:, None, None, None] * depth - targets.depth).abs() * nearness(targets)


def smooth_median(
    values: Tensor,  # [N]
    *,
    band: float = 0.05,
) -> Tensor:  # []
    """The median; its gradient reaches all values that are at most ``band`` of their number away from it."""
    with torch.no_grad():
        middle, aside = (len(values) + 1) // 2, int(band * len(values))
        low, high = (values.kthvalue(rank).values for rank in (middle - aside, middle + aside))
    mean = values[(values >= low) & (values <= high)].mean()
    return values.detach().median() * (mean / mean.detach())
