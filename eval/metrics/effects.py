"""Effects of a method on outputs, against the dense model and the true cameras, with intervals over scenes."""

from __future__ import annotations

import math
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
FEWEST = 2
"""Scenes that an interval needs."""


def effects(
    changed: Geometry,
    dense: Geometry,
    truth: Tensor | None,  # [S, 4, 4], cam_from_world
) -> dict[str, float]:
    """How much worse, or how far from the dense one, the output for one scene of two or more frames is.

    Returns:
        Against the dense output ``pose_deg`` and ``pose_median_deg`` (mean and median over pairs of frames of the
        larger angle), ``rotation_deg`` and ``translation_deg`` (means; opposite directions are 180 degrees apart),
        ``depth_rel`` (mean relative difference) and ``points`` (mean distance over the size of the scene). With true
        cameras also ``auc_30_loss`` and
        ``auc_5_loss``: AUC of the dense output minus that of the changed one, with directions folded as in VGGT.
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
    """Mean and its 95 % bootstrap interval, the same on every call.

    Args:
        values: One per scene; or one row of scenes per run, in which case both are resampled.
        resamples: Number of resamples.

    Returns:
        ``mean``, ``low``, ``high``. With fewer than two scenes the bounds are NaN.
    """
    sample = torch.atleast_2d(torch.tensor(values, dtype=torch.float64))
    if sample.shape[1] < FEWEST:
        return {"mean": float(sample.mean()), "low": math.nan, "high": math.nan}
    generator = torch.Generator().manual_seed(0)
    runs, scenes = (torch.randint(size, (resamples, size), generator=generator) for size in sample.shape)
    means = sample[runs[:, :, None], scenes[:, None, :]].mean(dim=(1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(sample.mean()), "low": low, "high": high}


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The interval of every effect available for all scenes."""
    return {name: interval([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def for_json(found: Mapping[str, float], digits: int | None = None) -> dict[str, float | None]:
    """A mean and its interval for JSON: None for unknown bounds; rounded if digits are given."""
    shown = found if digits is None else {key: round(value, digits) for key, value in found.items()}
    return {key: None if math.isnan(value) and key != "mean" else value for key, value in shown.items()}


def with_interval(found: Mapping[str, float | None], form: str, *, scale: float = 1) -> str:
    """A mean and its interval, times `scale`, as text: ``0.5 (0.4 to 0.6)``; only the mean if it has no interval.

    Args:
        found: Output of :func:`interval` or :func:`for_json`.
        form: Format of each number, such as ``+.3f``.
        scale: Factor to another unit, or -1 to show a loss as a change.
    """
    order = ("mean", "low", "high") if scale > 0 else ("mean", "high", "low")
    known = [value for value in (found[key] for key in order) if value is not None and not math.isnan(value)]
    mean, *bounds = (format(scale * value, form) for value in known)
    return f"{mean} ({' to '.join(bounds)})" if bounds else mean
