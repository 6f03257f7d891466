"""Scores of a sequence in windows: its trajectory, and each window separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics.geometry import camera_centers
from geoaccel.eval.metrics.pieces import aligned, drift_summary, errors_in_pieces, members, window_errors
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.metrics.trajectories import relative_pose_error
from geoaccel.eval.run.scoring import SceneScores, SequenceDetails, means
from geoaccel.eval.run.trajectory import Trajectory

OPEN = ("ate_rmse", "ate_percent", "are_rmse_deg")
"""Scores that are also reported without loop closure."""
COUNT = "kitti_subsequences"
POOLED = ("kitti_translation_percent", "kitti_rotation_deg_per_m")
"""Scores that are means over sub-sequences, also over those of all scenes."""


def score_sequence(found: Trajectory, scene: EvalScene, reference: Trajectory | None = None) -> SceneScores:
    """Compare the trajectory of a sequence with the ground truth.

    Args:
        found: The prediction.
        scene: The sequence.
        reference: The dense model's prediction, to compare with it.

    Returns:
        Values of :func:`geoaccel.eval.metrics.pieces.errors_in_pieces`; of these ``open_ate_rmse``,
        ``open_ate_percent`` and ``open_are_rmse_deg`` without loop closure; those of
        :func:`geoaccel.eval.metrics.pieces.drift_summary`, also without loop closure; numbers of ``windows``, of
        ``wide_windows`` used, of ``pieces``, ``cuts``, ``loops_closed`` and ``loops_rejected``; with a reference,
        ``fidelity_ate_percent``, in percent of the dense model's path. If the true camera is static, only
        ``rpe_rotation_deg``.

    Raises:
        ValueError: If the two have windows of different lengths.
    """
    truth = scene.cam_from_world
    values = errors_in_pieces(found.cam_from_world, truth, found.pieces())
    if "ate_rmse" not in values:  # nothing moves
        values["rpe_rotation_deg"] = relative_pose_error(found.cam_from_world, truth)["rpe_rotation_deg"]
    without = errors_in_pieces(found.open_cam_from_world, truth, found.pieces(closed=False))
    values |= {f"open_{name}": without[name] for name in OPEN if name in without}
    in_open = window_errors(found.windows(closed=False), truth)
    values |= drift_summary(in_open)
    if reference is not None:
        if not torch.equal(found.lengths, reference.lengths):
            ours, theirs = (f"{int(one[0])} frames, {int(one[1])} shared" for one in (found.lengths, reference.lengths))
            raise UserError(
                f"windows of {ours}, cannot be compared with the dense model's of {theirs}; predict both again in "
                "another folder (out=FOLDER)"
            )
        both = torch.stack([found.pieces(), reference.pieces()], dim=-1).unique(dim=0, return_inverse=True)[1]
        compared = errors_in_pieces(found.cam_from_world, reference.cam_from_world, both)
        values |= {"fidelity_ate_percent": compared["ate_percent"]} if "ate_percent" in compared else {}
    closed = int(found.loops[:, 2].sum())
    values |= {
        "windows": len(found.parts[:, 0].unique()),
        "wide_windows": int(found.wide[:, 3].sum()),
        "pieces": len(found.part_piece.unique()),
        "cuts": len(found.cuts),
        "loops_closed": closed,
        "loops_rejected": len(found.loops) - closed,
    }
    none = PairErrors(torch.empty(0), torch.empty(0))
    details = SequenceDetails(_about(found, in_open, truth), truth, _paths(found, truth))
    return SceneScores(scene.name, scene.category, len(scene.frames), none, values, details)


def _about(found: Trajectory, in_open: Sequence[dict[str, Any]], truth: Tensor) -> dict[str, Any]:
    """Pieces, cuts, loops and windows, as plain data."""
    pieces = [[int(frames[0]), int(frames[-1]), len(frames)] for frames in members(found.pieces())]
    windows = []
    for own, result in zip(in_open, window_errors(found.windows(), truth), strict=True):
        placed = {name: result[name] for name in ("scale", "rotation_deg")}
        moved = {f"open_{name}": own[name] for name in placed}
        windows.append(own | {"piece": result["piece"]} | placed | moved)
    return {
        "window": int(found.lengths[0]),
        "overlap": int(found.lengths[1]),
        "pieces": pieces,
        "cuts": found.cuts.tolist(),
        "wide": [
            {"first": first, "last": last, "every": every, "used": bool(used)}
            for first, last, every, used in found.wide.tolist()
        ],
        "loops": [{"frames": [first, second], "closed": bool(done)} for first, second, done in found.loops.tolist()],
        "windows": windows,
    }


def _paths(found: Trajectory, truth: Tensor) -> list[Tensor]:  # [n, 3] each
    """Camera centres of each piece in ground-truth coordinates, after its own similarity."""
    paths = []
    for frames in members(found.pieces()):
        fit = aligned(found.cam_from_world[frames], truth[frames])
        if fit is not None:
            paths.append(fit.apply_points(camera_centers(found.cam_from_world[frames])))
    return paths


def sequence_totals(scenes: Sequence[SceneScores]) -> dict[str, float]:
    """Means over sequences; KITTI's metric, as in its development kit, over the sub-sequences of all of them."""
    values = means(scenes)
    count = sum(scene.values.get(COUNT, 0) for scene in scenes)
    for name in POOLED if count else ():
        values[name] = sum(s.values[name] * s.values[COUNT] for s in scenes if COUNT in s.values) / count
        values[COUNT] = count
    return values
