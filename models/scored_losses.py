"""Depth and confidence as they are scored: errors relative to the distance, confidence after one scale for the scene.

Losses in the unit of the scene drown in far ground. And an error that all pixels share tells none of them from another,
so that confidence learns what one scale leaves. Both are used while a whole network learns (``scored`` of
:class:`geoaccel.models.objectives.Weights`) and on finished ones (:mod:`geoaccel.models.refinement`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.models.losses import Targets, gradient_loss


def relative_depth_losses(
    depth: Tensor,  # [B, S, H, W]
    conf: Tensor,  # [B, S, H, W], at least 1
    targets: Targets,
    *,
    alpha: float = 0.2,
) -> dict[str, Tensor]:
    """Depth and its confidence as they are scored: errors relative to the distance, confidence after one scale.

    Returns:
        ``loss_depth``, the relative error and the jumps in it, in the cameras' unit of length, and ``loss_conf``,
        ``e c - alpha log c`` of the error that one scale for the scene leaves: what all pixels share tells none of them
        from another. Confidence moves no depth.
    """
    near, valid = nearness(targets), targets.valid
    error = ((depth - targets.depth).abs() * near)[valid]
    ratio, seen = (depth * near).flatten(0, 1)[..., None], valid.flatten(0, 1)
    edges = gradient_loss(ratio, seen.float()[..., None], seen)
    left, certainty = scaled_error(depth, targets)[valid], conf[valid]
    return {
        "loss_depth": 2 * error.mean() + 0.3 * edges,
        "loss_conf": (left * certainty - alpha * certainty.log()).mean(),
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
    right = 1 / (1 + scaled_error(depth, targets)[targets.valid] / half_right)
    return F.binary_cross_entropy_with_logits(logits[targets.valid], right)


def nearness(targets: Targets) -> Tensor:  # [B, S, H, W]
    """One over the depth, 0 where there is none."""
    return torch.where(targets.valid, 1 / targets.depth.clamp(min=1e-3), 0.0)


@torch.no_grad()
def scaled_error(
    depth: Tensor,  # [B, S, H, W]
    targets: Targets,
) -> Tensor:  # [B, S, H, W]
    """Relative error of depth after each scene's ratio of median depths, the scale of the evaluators."""
    pairs = zip(depth, targets.depth, targets.valid, strict=True)
    scale = torch.stack([truth[valid].median() / own[valid].median() for own, truth, valid in pairs])
    return (scale[:, None, None, None] * depth - targets.depth).abs() * nearness(targets)
