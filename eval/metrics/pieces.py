"""Trajectory errors of a sequence in pieces, each with its own world frame, and the drift of its windows.

Each piece is aligned to the ground truth separately: unconnected pieces are not joined for scoring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from geoaccel.alignment import Similarity, umeyama
from geoaccel.eval.metrics.geometry import camera_centers, median, rotation_angle_deg
from geoaccel.eval.metrics.odometry import SubsequenceErrors, path_length, subsequence_errors
from geoaccel.eval.metrics.pose import pose_pair
from geoaccel.eval.metrics.trajectories import absolute_trajectory_error, relative_pose_error, stands_still

FEWEST = 3
"""Minimum cameras for a meaningful error after a similarity."""


def aligned(
    pred: Tensor,  # [S, 4, 4], cam_from_world
    gt: Tensor,  # [S, 4, 4], cam_from_world
) -> Similarity | None:
    """The similarity from predicted camera centres to the true ones; None if they do not determine it."""
    if len(gt) < FEWEST or stands_still(gt):
        return None
    return umeyama(camera_centers(pred), camera_centers(gt))


def members(
    piece: Tensor,  # [S], index of the piece of each frame
) -> list[Tensor]:
    """Frames of each piece, in order."""
    return [(piece == number).nonzero()[:, 0] for number in piece.unique()]


def errors_in_pieces(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world, each piece in a world of its own
    gt: Tensor,  # [S, 3|4, 4], cam_from_world
    piece: Tensor,  # [S], number of the piece of each frame
) -> dict[str, float]:
    """ATE, ARE and RPE over all pieces, each after its own similarity.

    Root mean squares are over the frames of all pieces. Only frames that are consecutive in the sequence count as
    consecutive in a piece: RPE, path lengths and KITTI's sub-sequences do not span other pieces in between. A piece of
    fewer than three frames, or without any motion, is not scored; it counts in ``scored_share``.

    Returns:
        ``ate_rmse`` in the unit of the ground truth; ``ate_percent``, in percent of the length of the piece's true
        path, so that short pieces have no advantage; ``are_rmse_deg``; ``rpe_translation``, ``rpe_rotation_deg``;
        ``scored_share``, the fraction of frames; and those of
        :func:`geoaccel.eval.metrics.odometry.subsequence_errors`, after the scale of the similarity, if a path is long
        enough. Only ``scored_share`` if no piece can be scored; no RPE if no piece has two consecutive frames.
    """
    pred, gt = pose_pair(pred, gt)
    squares: dict[str, list[tuple[int, float]]] = {}
    parts, scored = [], 0
    for frames in members(piece):
        own, true = pred[frames], gt[frames]
        if len(frames) < FEWEST or stands_still(true):
            continue
        scored += len(frames)
        found = absolute_trajectory_error(own, true)
        scale = found["ate_scale"]
        runs = _runs(frames)
        path = sum(path_length(true[run]) for run in runs) or path_length(true)
        found["ate_percent"] = 100 * found["ate_rmse"] / path
        for name in ("ate_rmse", "ate_percent", "are_rmse_deg"):
            squares.setdefault(name, []).append((len(frames), found[name]))
        for run in runs:
            for name, value in relative_pose_error(own[run], true[run], scale=scale).items():
                squares.setdefault(name, []).append((run.stop - run.start - 1, value))
            parts.append(subsequence_errors(own[run], true[run], scale=scale))
    pooled = {name: _pooled(values) for name, values in squares.items()}
    return {**pooled, "scored_share": scored / len(gt), **SubsequenceErrors.joined(parts).means()}


def _runs(
    frames: Tensor,  # [n], in order
) -> list[slice]:
    """Runs of two or more consecutive frames: frames that a loop adds to a piece have other pieces in between."""
    ends = [*((frames.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(frames)]
    return [slice(start, stop) for start, stop in pairwise([0, *ends]) if stop - start > 1]


def _pooled(values: Sequence[tuple[int, float]]) -> float:
    """Root mean square from pairs of a count and a root mean square."""
    return math.sqrt(sum(count * value**2 for count, value in values) / sum(count for count, _ in values))


@dataclass(frozen=True, eq=False)
class PlacedWindow:
    """A window, or its part between cuts, and its placement.

    Attributes:
        start, stop: Its frames in the sequence, from start to before stop.
        cam_from_world: [F, 4, 4], in the window's own world frame.
        piece: Index of its piece.
        scale: Scale of its world frame in that of its piece.
        rotation: Rotation from its world frame to that of its piece [3, 3].
    """

    start: int
    stop: int
    cam_from_world: Tensor
    piece: int
    scale: float
    rotation: Tensor


def window_errors(
    windows: Sequence[PlacedWindow],
    gt: Tensor,  # [S, 4, 4], cam_from_world
) -> list[dict[str, Any]]:
    """Errors of each window separately, and the drift of scale and rotation from window to window.

    Returns:
        Per window: ``start``, ``stop``, ``piece``; ``ate_rmse``, ``ate_percent`` of its own true path and
        ``are_rmse_deg`` after a similarity of the window alone; ``scale``, the true length of one unit of the piece's
        world frame at this window, over that at the first window of the piece; ``rotation_deg``, the rotation error
        relative to the first window of the piece; ``scale_step_percent`` and ``rotation_step_deg``, the same relative
        to the previous window. None if too few cameras move, or there is no previous window.
    """
    rows: list[dict[str, Any]] = []
    first: dict[int, _Seen] = {}
    before: dict[int, _Seen] = {}
    for window in windows:
        own, true = window.cam_from_world.double(), gt[window.start : window.stop].double()
        fit = aligned(own, true)
        scale = None if fit is None else float(fit.scale) / window.scale
        here = _Seen(scale, mean_rotation(true[:, :3, :3].mT @ own[:, :3, :3] @ window.rotation.double().mT))
        origin = first.setdefault(window.piece, here)
        if origin.scale is None:  # its camera did not move
            origin = first[window.piece] = _Seen(scale, origin.turn)
        found = {} if fit is None else absolute_trajectory_error(own, true)
        last = before.get(window.piece)
        rows.append(
            {
                "start": window.start,
                "stop": window.stop,
                "piece": window.piece,
                "ate_rmse": found.get("ate_rmse"),
                "ate_percent": 100 * found["ate_rmse"] / path_length(true) if found else None,
                "are_rmse_deg": found.get("are_rmse_deg"),
                "scale": here.over(origin),
                "rotation_deg": float(rotation_angle_deg(origin.turn, here.turn)),
                "scale_step_percent": None if (step := here.over(last)) is None else 100 * (step - 1),
                "rotation_step_deg": None if last is None else float(rotation_angle_deg(last.turn, here.turn)),
            }
        )
        before[window.piece] = here
    return rows


@dataclass(frozen=True, eq=False)
class _Seen:
    """The world frame of a piece at one of its windows, in the ground truth: length of its unit, and its rotation."""

    scale: float | None
    turn: Tensor

    def over(self, other: _Seen | None) -> float | None:
        """Its scale over another's."""
        if other is None or other.scale is None or self.scale is None:
            return None
        return self.scale / other.scale


def drift_summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over windows: ``window_ate_percent``, ``scale_step_percent`` without its sign, ``rotation_step_deg``."""
    found = {}
    for name, key in (
        ("window_ate_percent", "ate_percent"),
        ("scale_step_percent", "scale_step_percent"),
        ("rotation_step_deg", "rotation_step_deg"),
    ):
        values = [abs(row[key]) for row in rows if row.get(key) is not None]
        if values:
            found[name] = float(median(torch.tensor(values, dtype=torch.float64)))
    return found


def mean_rotation(
    rotations: Tensor,  # [N, 3, 3]
) -> Tensor:  # [3, 3]
    """The rotation closest to the mean of several."""
    u, _, vt = torch.linalg.svd(rotations.double().mean(dim=0))
    u = u.clone()
    u[:, 2] *= torch.linalg.det(u @ vt)
    return u @ vt
