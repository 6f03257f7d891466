"""The accelerated model against the dense one, on the same photographs and weights: needs no ground truth.

Zero everywhere means that a method changed nothing. It does not mean that the answer is right: the dense model is the
reference here, with its errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.eval.confidence import spearman
from geoaccel.eval.geometry import as_float64, median, rotation_angle_deg
from geoaccel.eval.pose import auc, relative_pose_errors

MAX_PIXELS = 200_000
"""Pixels of a scene that are ranked for the correlation of confidences."""


def fidelity(accelerated: Geometry, dense: Geometry) -> dict[str, float]:
    """How far an accelerated prediction of one scene (B = 1) is from the dense one.

    Nothing is aligned: both models have the same weights and the same reference frame, so a change of scale is a
    change.

    Returns:
        ``fidelity_auc_5``, ``fidelity_auc_30`` of the larger angle of all pairs, the dense poses taken as truth;
        medians ``fidelity_rotation_deg``, ``fidelity_translation_deg`` over pairs, and ``fidelity_rotation_max_deg``;
        ``fidelity_depth_abs_rel``; ``fidelity_point_distance``, mean distance of points over the size of the dense
        scene; ``fidelity_focal``, mean relative difference of focal lengths; ``fidelity_conf_spearman``, rank
        correlation of the confidences. A scene of one frame has no pairs and no pose keys; a constant confidence has
        no order, and no correlation is given.

    Raises:
        ValueError: If the two are not of the same frames and pixels.
    """
    if accelerated.depth.shape != dense.depth.shape or len(dense.depth) != 1:
        raise ValueError(
            f"two predictions of one and the same scene expected, got depth {list(accelerated.depth.shape)} and "
            f"{list(dense.depth.shape)}"
        )
    values: dict[str, float] = {}
    poses, reference = accelerated.cam_from_world[0].cpu(), dense.cam_from_world[0].cpu()
    if len(poses) > 1:
        rotation, translation = relative_pose_errors(poses, reference)
        worse = torch.maximum(rotation, translation)
        values = {f"fidelity_auc_{threshold}": auc(worse, threshold) for threshold in (5, 30)}
        values["fidelity_rotation_deg"] = float(median(rotation))
        values["fidelity_translation_deg"] = float(median(translation))
        values["fidelity_rotation_max_deg"] = float(rotation.max())
    frames = fidelity_per_frame(accelerated, dense)
    for name in ("depth_abs_rel", "point_distance", "focal"):
        values[f"fidelity_{name}"] = sum(frame[f"fidelity_{name}"] for frame in frames) / len(frames)
    step = max(1, dense.conf.numel() // MAX_PIXELS)
    conf, reference_conf = (g.conf.cpu().flatten()[::step] for g in (accelerated, dense))
    if torch.equal(conf, reference_conf):
        values["fidelity_conf_spearman"] = 1.0  # exactly, where a sum of ranks would round
    elif conf.min() < conf.max() and reference_conf.min() < reference_conf.max():
        values["fidelity_conf_spearman"] = spearman(conf, reference_conf)
    return values


def fidelity_per_frame(accelerated: Geometry, dense: Geometry) -> list[dict[str, float]]:
    """The same for each frame by itself: depth, points, focal length, and the turn of its camera in the world."""
    depth, reference = (as_float64(g.depth[0]) for g in (accelerated, dense))
    points, truth = (as_float64(g.points_world[0]) for g in (accelerated, dense))
    focal, true_focal = (as_float64(g.intrinsics[0])[:, [0, 1], [0, 1]] for g in (accelerated, dense))
    turn = rotation_angle_deg(accelerated.cam_from_world[0, :, :3, :3], dense.cam_from_world[0, :, :3, :3])
    size = scene_size(truth)
    return [
        {
            "fidelity_depth_abs_rel": float(_relative(depth[i], reference[i])),
            "fidelity_point_distance": float((points[i] - truth[i]).norm(dim=-1).mean() / size),
            "fidelity_focal": float(_relative(focal[i], true_focal[i])),
            "fidelity_camera_turn_deg": float(turn[i]),
        }
        for i in range(len(depth))
    ]


def scene_size(
    points: Tensor,  # [..., 3]
) -> Tensor:  # []
    """Twice the root mean square distance of points from their centre."""
    flat = points.flatten(0, -2)
    return (2 * (flat - flat.mean(dim=0)).square().sum(-1).mean().sqrt()).clamp(min=1e-12)


def _relative(value: Tensor, reference: Tensor) -> Tensor:
    return ((value - reference).abs() / reference.abs().clamp(min=1e-9)).mean()
