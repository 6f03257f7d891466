"""Depth and confidence as they are scored: errors relative to the distance, confidence after one scale for the scene.

Far ground would dominate losses in the unit of the scene. And an error common to all pixels does not distinguish them,
so confidence is trained on the error after one global scale. Both are used for training a whole network (``scored`` of
:class:`objectives.Weights`) and for refining finished ones (:mod:`refinement`).
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
        ``loss_depth``, the relative error in the cameras' unit of length, that after the evaluators' scale, and a
        gradient loss on it; and ``loss_conf``, ``e c - alpha log c`` of the error after one scale for the scene.
        Confidence has no gradient to depth.
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
    """Cross-entropy of pi3's confidence with the accuracy of each point: 1 without error, 1/2 at ``half_right``.

    With the paper's threshold most points simply count as right.
    """
    right = 1 / (1 + scaled_error(depth, targets)[targets.valid].detach() / half_right)
    return F.binary_cross_entropy_with_logits(logits[targets.valid], right)


def nearness(targets: Targets) -> Tensor:  # [B, S, H, W]
    """Inverse depth, 0 where depth is unknown."""
    return torch.where(targets.valid, 1 / targets.depth.clamp(min=1e-3), 0.0)


def scaled_error(
    depth: Tensor,  # [B, S, H, W]
    targets: Targets,
) -> Tensor:  # [B, S, H, W]
    """Relative error of depth after each scene's ratio of median depths, the scale of the evaluators.

    Its gradient also reaches depth through the scale. Depth with unbiased errors per pixel has a biased median, as the
    depth distribution of a scene is skewed; the evaluators' scale then adds this bias to every pixel.
    """
    pairs = zip(depth, targets.depth, targets.valid, strict=True)
    scale = torch.stack([truth[valid].median() / smooth_median(own[valid]) for own, truth, valid in pairs])
    return (scale[:, None, None, None] * depth - targets.depth).abs() * nearness(targets)


def smooth_median(
    values: Tensor,  # [N]
    *,
    band: float = 0.05,
) -> Tensor:  # []
    """The median; its gradient reaches all values within a fraction ``band`` of ranks around it."""
    with torch.no_grad():
        middle, aside = (len(values) + 1) // 2, int(band * len(values))
        low, high = (values.kthvalue(rank).values for rank in (middle - aside, middle + aside))
    mean = values[(values >= low) & (values <= high)].mean()
    return values.detach().median() * (mean / mean.detach())
