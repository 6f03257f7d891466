"""What a method does to outputs, against the dense model and the true cameras, with intervals over scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.eval.metrics.fidelity import fidelity_per_frame
from geoaccel.eval.metrics.geometry import median
from geoaccel.eval.metrics.pose import auc, relative_pose_errors

EFFECTS = ("pose_deg", "rotation_deg", "translation_deg", "depth_rel", "points", "auc_30_loss", "auc_5_loss")
"""Names of effects; larger is worse. The last two need true cameras."""
RESAMPLES = 2000


def effects(
    changed: Geometry,
    dense: Geometry,
    truth: Tensor | None,  # [S, 4, 4], cam_from_world
) -> dict[str, float]:
    """How much worse, or how far away, the output for one scene of two or more frames is.

    Returns:
        Against the dense output ``pose_deg`` and ``pose_median_deg`` (mean and median over pairs of frames of the
        larger angle), ``rotation_deg`` and ``translation_deg`` (means; opposite directions are 180 degrees apart),
        ``depth_rel`` (mean relative difference) and ``points`` (mean distance over the size of the scene). With true
        cameras also ``auc_30_loss`` and
        ``auc_5_loss``: AUC of the dense output less that of the changed one, with directions folded as VGGT evaluates.
    """
    cameras, reference = changed.cam_from_world[0], dense.cam_from_world[0]
    rotation, translation = relative_pose_errors(cameras, reference, fold_translation=False)
    larger = torch.maximum(rotation, translation)
    frames = fidelity_per_frame(changed, dense)
    found = {
        "pose_deg": float(larger.mean()),
        "pose_median_deg": float(median(larger)),
        "rotation_deg": float(rotation.mean()),
        "translation_deg": float(translation.mean()),
        "depth_rel": sum(frame["fidelity_depth_abs_rel"] for frame in frames) / len(frames),
        "points": sum(frame["fidelity_point_distance"] for frame in frames) / len(frames),
    }
    if truth is not None:
        before, after = (torch.maximum(*relative_pose_errors(poses, truth)) for poses in (reference, cameras))
        found |= {f"auc_{degrees}_loss": auc(before, degrees) - auc(after, degrees) for degrees in (30, 5)}
    return found


def interval(values: Sequence[float] | Sequence[Sequence[float]], *, resamples: int = RESAMPLES) -> dict[str, float]:
    """Mean, and the 95 % interval of the mean by the bootstrap, the same on every call.

    Args:
        values: One for each scene; or a row of scenes for each run, of which both are resampled.
        resamples: How often.

    Returns:
        ``mean``, ``low``, ``high``.
    """
    sample = torch.atleast_2d(torch.tensor(values, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    runs, scenes = (torch.randint(size, (resamples, size), generator=generator) for size in sample.shape)
    means = sample[runs[:, :, None], scenes[:, None, :]].mean(dim=(1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(sample.mean()), "low": low, "high": high}


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The interval of every effect that all scenes have."""
    return {name: interval([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
