"""Trajectory errors: of camera centres and rotations after alignment (ATE, ARE), and of relative motion (RPE)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from geoaccel.alignment import umeyama
from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.eval.metrics.geometry import (
    as_poses,
    camera_centers,
    rotation_angle_deg,
)
from geoaccel.eval.metrics.pose import ROUNDING, pose_pair


def absolute_trajectory_error(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    *,
    align: Literal["sim3", "se3", "none"] = "sim3",
    align_origin: bool = False,
) -> dict[str, float]:
    """Distance of the camera centres (ATE) and angle of the cameras (ARE) after alignment.

    After ``sim3`` two cameras always fit; the error is meaningful from three cameras on. If the centres are collinear,
    the rotation about their line is undetermined, and so are the angles.

    Args:
        pred: Predicted poses.
        gt: Ground truth of the same frames.
        align: What is fitted to the camera centres.
        align_origin: Afterwards move the trajectory rigidly so that its first camera is the true one, as evo does with
            both options. Only the scale of ``align`` then remains.

    Returns:
        ``ate_rmse`` (ATE in papers), ``ate_mean``, ``ate_median``, in the unit of the ground truth; the applied
        ``ate_scale``; ``are_rmse_deg``, the root mean square of the angles.

    Raises:
        ValueError: If the ground truth does not move: every prediction would be perfect after scaling.
    """
    pred, gt = pose_pair(pred, gt)
    source, target = camera_centers(pred), camera_centers(gt)
    if align not in ("sim3", "se3", "none"):
        raise UserError(f"align={align!r} is unknown. Known: sim3, se3, none")
    if align == "sim3" and stands_still(gt):
        raise UserError("all ground-truth cameras are at one position: ATE after sim3 is undefined; use align='se3'")
    scale = 1.0
    if align != "none":
        similarity = umeyama(source, target, with_scale=align == "sim3")
        source, scale = similarity.apply_points(source), float(similarity.scale)
        pred = similarity.apply_poses(pred)
    if align_origin:
        turn = gt[0, :3, :3].T @ pred[0, :3, :3]
        source = (source - source[0]) @ turn.T + target[0]
        pred = pred.clone()
        pred[:, :3, :3] = pred[:, :3, :3] @ turn.T
    distance = (source - target).norm(dim=-1)
    angle = rotation_angle_deg(pred[:, :3, :3], gt[:, :3, :3])
    return {
        "ate_rmse": float(distance.square().mean().sqrt()),
        "ate_mean": float(distance.mean()),
        "ate_median": float(distance.quantile(0.5)),
        "ate_scale": scale,
        "are_rmse_deg": float(angle.square().mean().sqrt()),
    }


def stands_still(
    cam_from_world: Tensor,  # [S, 3|4, 4]
) -> bool:
    """Whether all cameras are at one position, up to rounding."""
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
    """Error of the motion from each frame to the one ``delta`` later (RPE), root mean square as in evo.

    Args:
        pred: Predicted poses, in the order of the video.
        gt: Ground truth of the same frames.
        delta: Distance of the two frames.
        scale: Multiplies predicted translations: ``ate_scale`` gives RPE after Sim(3) alignment, whose rotation and
            translation have no effect here.

    Returns:
        ``rpe_translation`` in the unit of the ground truth, and ``rpe_rotation_deg``.
    """
    pred, gt = pose_pair(pred, gt)
    if not 1 <= delta < len(gt):
        raise UserError(f"delta={delta} needs more than {delta} frames, got {len(gt)}; choose a smaller delta")
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
    """ATE, ARE and RPE after Sim(3) alignment, as in the tables for Sintel, TUM-dynamics and ScanNet.

    Args:
        pred: Predicted poses, in the order of the video.
        gt: Ground truth of the same frames.
        fastvggt_compat: Reproduce FastVGGT's ScanNet script, which passes camera-from-world matrices to a tool that
            expects world-from-camera: its "positions" are the translations of cam_from_world, not the centres. It
            also aligns origins after the similarity, so that the first camera always has no error.
    """
    pred, gt = pose_pair(pred, gt)
    if fastvggt_compat:
        pred, gt = invert_rigid(pred), invert_rigid(gt)
    errors = absolute_trajectory_error(pred, gt, align_origin=fastvggt_compat)
    return errors | relative_pose_error(pred, gt, scale=errors["ate_scale"])
