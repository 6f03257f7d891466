"""Camera pose errors: angles between all pairs of frames, their AUC, and trajectory errors after alignment.

    rotation_deg, translation_deg = relative_pose_errors(pred, gt)
    auc(torch.maximum(rotation_deg, translation_deg), 30)

Published numbers disagree because protocols do. `PROTOCOLS` holds them by name; each docstring says what differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.eval.metrics.geometry import (
    as_float64,
    as_poses,
    camera_centers,
    direction_angle_deg,
    pair_indices,
    relative_poses,
    rotation_angle_deg,
    umeyama,
)

THRESHOLDS_DEG = (3, 5, 15, 30)
# What float32, or text of seven digits, leaves of a translation. Scenes carry float64 whatever their files hold, so the
# dtype of a tensor does not say how exact its numbers are.
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

    Two cases have no direction to compare. Where the *ground truth* does not move between two frames (by no more than
    a millionth of the translations, which is rounding), the translation error is 0 and rotation alone decides; VGGT's
    script counts 90 degrees there, even for a perfect prediction. Where only the *prediction* does not move, it is
    90 degrees. So poses in map coordinates, a million baselines from their origin, must be moved near it first.

    Args:
        pred: Predicted poses.
        gt: Ground truth of the same frames.
        fold_translation: Treat opposite directions as equal, min(a, 180 - a): errors lie in 0 to 90.
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
    pred64, gt64 = _pose_pair(pred, gt)
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

    The mean, over k = 1 ... threshold, of the share of errors below k degrees (the last bin includes its upper
    edge), which is VGGT's histogram. All zero gives 1; infinite errors count as failures.

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
    """Share of errors below the threshold: RRA of rotation errors, RTA of translation errors."""
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


def absolute_trajectory_error(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    *,
    align: Literal["sim3", "se3", "none"] = "sim3",
) -> dict[str, float]:
    """Distance of the camera centres after alignment (ATE), in the unit of the ground truth.

    Two cameras always fit after ``sim3``; a number means something from three cameras on.

    Returns:
        ``ate_rmse`` (what papers call ATE), ``ate_mean``, ``ate_median``, and the ``ate_scale`` that was applied.

    Raises:
        ValueError: If the ground truth does not move: every prediction would be perfect after scaling.
    """
    pred, gt = _pose_pair(pred, gt)
    source, target = camera_centers(pred), camera_centers(gt)
    if align not in ("sim3", "se3", "none"):
        raise UserError(f"align={align!r} is unknown. Known: sim3, se3, none")
    if align == "sim3" and stands_still(gt):
        raise UserError("all ground-truth cameras are at one place: ATE after a similarity is undefined, use se3")
    scale = 1.0
    if align != "none":
        similarity = umeyama(source, target, with_scale=align == "sim3")
        source, scale = similarity.apply_points(source), float(similarity.scale)
    distance = (source - target).norm(dim=-1)
    return {
        "ate_rmse": float(distance.square().mean().sqrt()),
        "ate_mean": float(distance.mean()),
        "ate_median": float(distance.quantile(0.5)),
        "ate_scale": scale,
    }


def stands_still(
    cam_from_world: Tensor,  # [S, 3|4, 4]
) -> bool:
    """Whether all cameras are at one place, up to rounding."""
    poses = as_poses(cam_from_world)
    centers = camera_centers(poses)
    moved = (centers - centers[:1]).norm(dim=-1).max()
    return bool(moved <= ROUNDING * 2 * poses[:, :3, 3].norm(dim=-1).max())


def relative_pose_error(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    *,
    delta: int = 1,
    scale: float = 1.0,
) -> dict[str, float]:
    """Error of the motion from each frame to the one ``delta`` later (RPE), root mean square as evo reports it.

    Args:
        pred: Predicted poses, in the order of the video.
        gt: Ground truth of the same frames.
        delta: Distance of the two frames.
        scale: Multiplies predicted translations: ``ate_scale`` gives RPE after Sim(3) alignment, of which rotation
            and translation cannot matter here.

    Returns:
        ``rpe_translation`` in the unit of the ground truth, and ``rpe_rotation_deg``.
    """
    pred, gt = _pose_pair(pred, gt)
    if not 1 <= delta < len(gt):
        raise UserError(f"delta={delta} needs more than {delta} frames, got {len(gt)}")
    pred_motion, gt_motion = (poses[:-delta] @ invert_rigid(poses[delta:]) for poses in (pred, gt))
    distance = (scale * pred_motion[:, :3, 3] - gt_motion[:, :3, 3]).norm(dim=-1)
    angle = rotation_angle_deg(pred_motion[:, :3, :3], gt_motion[:, :3, :3])
    return {
        "rpe_translation": float(distance.square().mean().sqrt()),
        "rpe_rotation_deg": float(angle.square().mean().sqrt()),
    }


def trajectory_errors(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    *,
    fastvggt_compat: bool = False,
) -> dict[str, float]:
    """ATE and RPE after Sim(3) alignment, as in the tables for Sintel, TUM-dynamics and ScanNet.

    Args:
        pred: Predicted poses, in the order of the video.
        gt: Ground truth of the same frames.
        fastvggt_compat: Reproduce FastVGGT's ScanNet script, which hands camera-from-world matrices to a tool that
            expects world-from-camera: its "positions" are the translations of cam_from_world, not the centres.
    """
    pred, gt = _pose_pair(pred, gt)
    if fastvggt_compat:
        pred, gt = invert_rigid(pred), invert_rigid(gt)
    errors = absolute_trajectory_error(pred, gt)
    return errors | relative_pose_error(pred, gt, scale=errors["ate_scale"])


@dataclass(frozen=True)
class PairErrors:
    """Errors of all pairs of one sequence; translation not folded, so that every variant can be made of it."""

    rotation_deg: Tensor  # [P], 0 to 180
    translation_deg: Tensor  # [P], 0 to 180
    category: str = ""


@dataclass(frozen=True)
class PoseProtocol:
    """How a paper turns poses into one number: choice of frames, errors of a pair, aggregation.

    Drawing frames belongs to the data sets; the fields say how (``seed``, ``num_frames``, ``min_images``).
    """

    name: str
    num_frames: int = 10
    seed: int = 0
    min_images: int = 0
    fold_translation: bool = True
    direction: Literal["i_from_j", "j_from_i", "both"] = "i_from_j"
    aggregate: Literal["category_mean", "pooled"] = "pooled"
    thresholds_deg: tuple[int, ...] = THRESHOLDS_DEG

    def errors(
        self,
        pred: Tensor,  # [S, 3|4, 4], cam_from_world
        gt: Tensor,  # [S, 3|4, 4], cam_from_world
        category: str = "",
    ) -> PairErrors:
        """Errors of one sequence, in this protocol's pair direction and not folded yet."""
        rotation, translation = relative_pose_errors(pred, gt, fold_translation=False, direction=self.direction)
        return PairErrors(rotation, translation, category)

    def scores(self, sequences: Iterable[PairErrors]) -> dict[str, float]:
        """Scores of a data set, or of one sequence.

        Returns:
            ``auc_30``, ``rra_30``, ``rta_30`` and so on under this protocol's aggregation; the same with the suffixes
            ``_category_mean`` and ``_pooled``; and, as a column of their own, ``auc_30_unfolded`` (and so on) where
            this protocol folds translations.
        """
        sequences = list(sequences)
        if not sequences:
            raise UserError(f"protocol {self.name}: there is no sequence to score")
        both = self._aggregates(sequences, folded=self.fold_translation)
        result = dict(both[self.aggregate])
        if self.fold_translation:
            unfolded = self._aggregates(sequences, folded=False)[self.aggregate]
            result |= {f"{key}_unfolded": value for key, value in unfolded.items() if key.startswith("auc")}
        for kind, values in both.items():
            result |= {f"{key}_{kind}": value for key, value in values.items()}
        return result

    def _aggregates(self, sequences: list[PairErrors], folded: bool) -> dict[str, dict[str, float]]:
        def score(chosen: list[PairErrors]) -> dict[str, float]:
            rotation = torch.cat([as_float64(s.rotation_deg) for s in chosen])
            translation = torch.cat([as_float64(s.translation_deg) for s in chosen])
            return pair_scores(rotation, fold(translation) if folded else translation, self.thresholds_deg)

        categories = sorted({s.category for s in sequences})
        each = [score([s for s in sequences if s.category == category]) for category in categories]
        mean = {key: sum(scores[key] for scores in each) / len(each) for key in each[0]}
        return {"category_mean": mean, "pooled": score(sequences)}


@dataclass(frozen=True)
class VggtCo3d(PoseProtocol):
    """VGGT's CO3Dv2 evaluation, "AUC@30 of 10 random frames".

    Ten frames of each test sequence with at least 50 images, drawn with NumPy seed 0, sequences in sorted order, so
    that a skipped sequence changes all later draws. 45 pairs, relative pose T_i T_j^-1, translation folded to 0-90.
    Pairs of all sequences of a category together give its AUC; categories are averaged without weights.
    Depends on the order of the frames: the translation of a pair is compared in the frame of camera i.
    """

    name: str = "vggt-co3d"
    min_images: int = 50
    aggregate: Literal["category_mean", "pooled"] = "category_mean"


@dataclass(frozen=True)
class Pi3Co3d(PoseProtocol):
    """pi3's angular evaluation on CO3Dv2 and RealEstate10K.

    Differs from `vggt-co3d`: frames from frozen lists (made with seed 42), relative pose T_j T_i^-1, and all pairs of
    all sequences pooled, so that large categories weigh more. pi3's tables give 5, 15 and 30 degrees.
    """

    name: str = "pi3-co3d"
    seed: int = 42
    direction: Literal["i_from_j", "j_from_i", "both"] = "j_from_i"


@dataclass(frozen=True)
class Strict(PoseProtocol):
    """Ours: nothing forgiven, nothing arbitrary. Not comparable with published tables.

    Differs from `vggt-co3d`: translation is not folded (moving backwards is wrong, not right), and a pair's
    translation error is the larger one of both directions, so that the order of frames does not matter. Frames and
    the mean over categories are those of `vggt-co3d`.
    """

    name: str = "strict"
    min_images: int = 50
    fold_translation: bool = False
    direction: Literal["i_from_j", "j_from_i", "both"] = "both"
    aggregate: Literal["category_mean", "pooled"] = "category_mean"


PROTOCOLS: dict[str, PoseProtocol] = {protocol.name: protocol for protocol in (VggtCo3d(), Pi3Co3d(), Strict())}


def _pose_pair(pred: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    pred, gt = as_poses(pred, "pred"), as_poses(gt, "gt")
    if pred.shape != gt.shape or pred.ndim != 3:
        raise ValueError(f"pred and gt must be [S, 4, 4] with the same S, got {list(pred.shape)} and {list(gt.shape)}")
    if len(gt) < 2:
        raise UserError(f"pose errors are relative and need at least 2 frames, got {len(gt)}")
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
