"""Camera pose errors: angles between all pairs of frames, and their AUC.

rotation_deg, translation_deg = relative_pose_errors(pred, gt)
auc(torch.maximum(rotation_deg, translation_deg), 30)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from geoaccel.alignment import as_float64
from geoaccel.errors import UserError
from geoaccel.eval.metrics.geometry import (
    as_poses,
    direction_angle_deg,
    pair_indices,
    relative_poses,
    rotation_angle_deg,
)

THRESHOLDS_DEG = (3, 5, 15, 30)
# Rounding error of a translation in float32, or as text with seven digits. Scenes use float64 whatever their files
# store, so the dtype of a tensor does not tell its precision.
ROUNDING = 1e-6


def relative_pose_errors(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    *,
    fold_translation: bool = True,
    direction: Literal["i_from_j", "j_from_i", "both"] = "i_from_j",
) -> tuple[Tensor, Tensor]:  # [P], [P] with P = S (S - 1) / 2
    """Rotation and translation angle errors of all pairs i < j, in degrees.

    The defaults are those of VGGT's evaluation, which published tables use. The result does not depend on the world
    frame or on the scale of either side.

    In two cases there is no direction to compare. If the *ground truth* does not move between two frames (by no more
    than a millionth of the translations, which is rounding), the translation error is 0 and only rotation counts;
    VGGT's script counts 90 degrees there, even for a perfect prediction. If only the *prediction* does not move, it is
    90 degrees. So poses in map coordinates, a million baselines from their origin, must be moved near it first.

    Args:
        pred: Predicted poses.
        gt: Ground truth of the same frames.
        fold_translation: Treat opposite directions as equal, min(a, 180 - a): errors are from 0 to 90.
        direction: The relative pose whose translation is compared: T_i T_j^-1 (``i_from_j``), T_j T_i^-1
            (``j_from_i``), or the larger error of the two (``both``), the only one that does not depend on the
            order of the frames. The rotation error is the same in all three.

    Returns:
        Rotation errors (0 to 180) and translation errors, ordered by i, then j.

    Raises:
        ValueError: On fewer than two frames, differing shapes, non-finite or non-rigid poses.
    """
    if direction == "both":
        rotation_deg, one = relative_pose_errors(pred, gt, fold_translation=fold_translation)
        _, other = relative_pose_errors(pred, gt, fold_translation=fold_translation, direction="j_from_i")
        return rotation_deg, torch.maximum(one, other)
    pred64, gt64 = pose_pair(pred, gt)
    pred_relative, gt_relative = (relative_poses(poses, direction=direction) for poses in (pred64, gt64))
    rotation_deg = rotation_angle_deg(pred_relative[:, :3, :3], gt_relative[:, :3, :3])
    translation_deg = direction_angle_deg(pred_relative[:, :3, 3], gt_relative[:, :3, 3])
    translation_deg[_no_baseline(pred_relative, pred64)] = 90.0
    translation_deg[_no_baseline(gt_relative, gt64)] = 0.0
    return rotation_deg, fold(translation_deg) if fold_translation else translation_deg


def fold(
    angle_deg: Tensor,  # [...], 0 to 180
) -> Tensor:  # [...], 0 to 90
    """Identify opposite directions: the smaller of the angle and its supplement."""
    return torch.minimum(angle_deg, 180.0 - angle_deg)


def auc(
    errors_deg: Tensor,  # [P]
    threshold_deg: int,
) -> float:
    """Area under the recall curve up to a threshold, with 1-degree bins, in [0, 1].

    The mean, over k = 1 ... threshold, of the fraction of errors below k degrees (the last bin includes its upper
    edge), as in VGGT's histogram. All zero gives 1; infinite errors count as failures.

    Args:
        errors_deg: One error per pair: usually the larger of the rotation and the translation error.
        threshold_deg: A positive whole number.
    """
    errors = _checked_errors(errors_deg)
    if threshold_deg != int(threshold_deg) or threshold_deg < 1:
        raise UserError(f"threshold_deg={threshold_deg}: bins are 1 degree wide, so give a whole number of at least 1")
    upper_edges = torch.arange(1, int(threshold_deg) + 1, dtype=torch.float64)
    below = torch.searchsorted(errors.sort().values, upper_edges).double()
    below[-1] = (errors <= threshold_deg).sum()
    return float(below.mean() / len(errors))


def recall(
    errors_deg: Tensor,  # [P]
    threshold_deg: float,
) -> float:
    """Fraction of errors below the threshold: RRA for rotation errors, RTA for translation errors."""
    return float((_checked_errors(errors_deg) < threshold_deg).double().mean())


def pair_scores(
    rotation_deg: Tensor,  # [P]
    translation_deg: Tensor,  # [P]
    thresholds_deg: tuple[int, ...] = THRESHOLDS_DEG,
) -> dict[str, float]:
    """RRA, RTA and AUC at each threshold, as ``rra_5``, ``rta_5``, ``auc_5``; AUC of the larger error of a pair."""
    rotation_deg, translation_deg = as_float64(rotation_deg), as_float64(translation_deg)
    scores = {f"auc_{t}": auc(torch.maximum(rotation_deg, translation_deg), t) for t in thresholds_deg}
    scores |= {f"rra_{t}": recall(rotation_deg, t) for t in thresholds_deg}
    scores |= {f"rta_{t}": recall(translation_deg, t) for t in thresholds_deg}
    return scores


def pose_pair(pred: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:  # [S, 4, 4] twice, float64
    """Poses of the same frames, checked.

    Raises:
        ValueError: On differing shapes, non-finite or non-rigid poses.
    """
    pred, gt = as_poses(pred, "pred"), as_poses(gt, "gt")
    if pred.shape != gt.shape or pred.ndim != 3:
        raise ValueError(f"pred and gt must be [S, 4, 4] with the same S, got {list(pred.shape)} and {list(gt.shape)}")
    if len(gt) < 2:
        raise UserError(f"pose errors need at least 2 frames, got {len(gt)}")
    return pred, gt


def _no_baseline(
    relative: Tensor,  # [P, 4, 4]
    poses: Tensor,  # [S, 4, 4]
) -> Tensor:  # [P], bool
    """Pairs whose translation is no more than the rounding error of the poses' own numbers."""
    i, j = pair_indices(len(poses))
    size = poses[:, :3, 3].norm(dim=-1)
    return relative[:, :3, 3].norm(dim=-1) <= ROUNDING * (size[i] + size[j])


def _checked_errors(errors_deg: Tensor) -> Tensor:  # [P], float64
    errors = as_float64(errors_deg).flatten()
    if len(errors) == 0:
        raise UserError("no errors to score: at least one pair of frames is needed")
    if errors.isnan().any() or (errors < 0).any():
        raise UserError("errors must be angles of at least 0 degrees; got NaN or negative values")
    return errors
