"""Bundle adjustment of a reconstruction: cameras, points and depth are fitted to tracks measured in the photographs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from geoaccel.cameras import unproject_frames
from geoaccel.errors import UserError
from geoaccel.registry import unknown
from geoaccel.scene import Scene
from geoaccel.tracks import LEAST_TRACKS, Cameras, Tracks, measure_tracks, reprojection_errors, triangulate
from geoaccel.tracks.adjust import ENOUGH, Lens, Prior, adjust
from geoaccel.tracks.features import INSTALL, pycolmap_here, require_pycolmap
from geoaccel.tracks.predicted import sample_depth
from geoaccel.tracks.selected import selected_tracks
from geoaccel.tracks.turned import laid, of_one_camera, stood

logger = logging.getLogger(__name__)

METHODS = ["ba"]
TRACKS = ["auto", "measure", "project", "head"]
"""Source of the observations of a COLMAP model: measured if pycolmap is installed, measured, projected, tracked by the
network's own track head."""
HELD_OUT = 0.15
LEAST_HELD_OUT = 10
LEAST_LONG = 4  # tracks of three views or more, for each image
LEAST_OBSERVATIONS = 15  # of an image that is adjusted
LEAST_GAIN = 0.05
CAP_PIXELS = 10.0  # an error above this is a wrong match, whatever its size
PRIOR = 0.02  # standard deviation of predicted camera positions, as a fraction of the median depth
ROUNDS = 2

S = TypeVar("S", bound=Scene)


@dataclass(frozen=True)
class Adjustment:
    """What bundle adjustment did.

    Attributes:
        changed: False if it was no improvement, and the scene is unchanged.
        held_out: Number of tracks held out to judge the result.
        error_before: Mean reprojection error on held-out tracks, in original pixels; None if none were held out.
        error_after: The same with the adjusted cameras.
        tracks: All tracks.
        kept: Number of tracks that agree with the result.
        turned_deg: Median rotation of the cameras, in degrees.
        moved: Median translation of the cameras, as a fraction of the median depth.
        reason: Why it changed nothing.
    """

    changed: bool
    held_out: int = 0
    error_before: float | None = None
    error_after: float | None = None
    tracks: int = 0
    kept: int = 0
    turned_deg: float = 0.0
    moved: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if not self.changed or self.error_before is None or self.error_after is None:
            return f"bundle adjustment changed nothing: {self.reason}"
        return (
            f"bundle adjustment: error {self.error_before:.2f} to {self.error_after:.2f} pixels on {self.held_out} "
            f"held-out tracks; {self.kept:,} of {self.tracks:,} tracks kept; cameras rotated by "
            f"{self.turned_deg:.2f} degrees and moved by {100 * self.moved:.1f} % of the depth (medians)"
        )


def check_refine(method: str | None) -> None:
    """Refuse an unknown method, or a known one whose package is missing."""
    if method is None:
        return
    if method not in METHODS:
        raise UserError(unknown("refinement", method, METHODS))
    require_pycolmap("refine='ba' (--refine ba)")


def check_tracks(choice: str) -> None:
    """Refuse an unknown source of tracks, or measuring without pycolmap."""
    if choice not in TRACKS:
        raise UserError(unknown("source of tracks", choice, TRACKS))
    if choice in ("measure", "head"):
        require_pycolmap(f"tracks={choice!r} (--tracks {choice})")


def with_tracks(scene: S, choice: str) -> S:
    """The scene with the tracks for its COLMAP model.

    Args:
        scene: Its existing tracks stay, except with ``project``.
        choice: One of `TRACKS`.

    Raises:
        UserError: If tracks must be measured and pycolmap is not installed, or tracks of the head do not exist.
    """
    check_tracks(choice)
    if choice == "project":
        return replace(scene, tracks=None)
    if scene.tracks is not None:
        return _few(scene) if choice == "head" else scene
    if choice == "head":
        raise UserError("tracks='head' needs the network: pass it to geoaccel.reconstruct, and save that result")
    if not pycolmap_here():
        logger.warning(
            "observations in the COLMAP model are projections of its points, not measurements, as pycolmap is not "
            "installed; for tracks suitable for bundle adjustment: %s",
            INSTALL,
        )
        return scene
    return _few(replace(scene, tracks=measure_tracks(scene)))


def _few(scene: S) -> S:
    """The same scene, with a warning if it has too few tracks."""
    assert scene.tracks is not None
    if len(scene.tracks) < LEAST_TRACKS and len(scene) > 1:  # one image never has any
        logger.warning(
            "%d points were matched in two images or more, too few for a COLMAP model: its observations are "
            "projections of the points of the cloud; larger or sharper images give more matches",
            len(scene.tracks),
        )
    return scene


def bundle_adjust(scene: S, *, lens: Lens | None = None) -> tuple[S, Adjustment]:
    """Adjust the cameras of a scene to measured tracks; the first camera and the scale stay.

    An image with few observations is not adjusted, and keeps its pose relative to the others as a whole. Some tracks
    are held out to judge the result, which is accepted only if it lowers their reprojection error.

    Args:
        scene: Its `tracks` are used, or measured if it has none, in both cases without masked pixels.
        lens: As in `geoaccel.tracks.adjust`. By default ``fixed`` is tried and, if every image has enough observations,
            the other that fits (``shared`` if all intrinsics are the same, up to a quarter turn).

    Returns:
        The scene with new cameras, points and tracks, its depth rescaled image by image, and a report.

    Raises:
        UserError: pycolmap is not installed.
    """
    check_refine("ba")
    tracks = measure_tracks(scene) if scene.tracks is None else selected_tracks(scene, scene.tracks)
    scene = replace(scene, tracks=tracks)
    held = _held_out(len(tracks))
    # Only tracks of three views or more determine the relative lengths of baselines.
    tied = len(scene) == 2 or (tracks.lengths() >= 3).sum() >= LEAST_LONG * len(scene)
    if held.sum() < LEAST_HELD_OUT or not tied:
        few = f"{tracks} are too few for bundle adjustment; take more, larger or sharper photographs"
        return scene, Adjustment(changed=False, tracks=len(tracks), reason=few)
    before = Cameras.of(scene)
    judge, used = tracks.where(held), tracks.where(~held)
    error = _error(judge, before)
    lying, laid_tracks = laid(before, used)  # COLMAP shares a camera between images of one size alone
    trials = [
        stood(_adjusted(lying, laid_tracks, choice), before) if choice == "shared" else _adjusted(before, used, choice)
        for choice in ([lens] if lens else _lenses(before, used))
    ]
    errors = [_error(judge, trial) for trial in trials]
    best = int(np.argmin(errors))
    if not errors[best] < (1 - LEAST_GAIN) * error:
        why = f"{errors[best]:.2f} pixels on held-out tracks, {error:.2f} before"
        return scene, Adjustment(False, int(held.sum()), error, errors[best], len(tracks), len(tracks), reason=why)
    after = trials[best]
    result = _follow(scene, after)
    turned, moved = _motion(before, after)
    depth = float(scene.depth[scene.mask].median())
    kept = 0 if result.tracks is None else len(result.tracks)
    done = Adjustment(True, int(held.sum()), error, errors[best], len(tracks), kept, turned, moved / depth)
    return result, done


def _held_out(count: int) -> np.ndarray:  # [N] bool
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[: round(HELD_OUT * count)]] = True
    return chosen


def _error(tracks: Tracks, cameras: Cameras) -> float:
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    return float(errors.clip(max=CAP_PIXELS).mean())


def _lenses(cameras: Cameras, tracks: Tracks) -> list[Lens]:
    """Choices to try: fixed focal lengths, and adjusted ones if every image has enough observations."""
    if np.bincount(tracks.frame, minlength=len(cameras.sizes)).min() < ENOUGH:
        return ["fixed"]
    return ["fixed", "shared" if of_one_camera(cameras) else "free"]


def _adjusted(before: Cameras, tracks: Tracks, lens: Lens) -> Cameras:
    """Cameras after a few rounds, each without the outlier observations of the last one."""
    rich = np.bincount(tracks.frame, minlength=len(before.sizes)) >= LEAST_OBSERVATIONS
    tracks, _ = tracks.keep(rich[tracks.frame])
    cameras = before
    if not len(tracks):
        return before
    moved = np.isin(np.arange(len(rich)), tracks.frame)
    points = triangulate(tracks, before)
    _, inside = before.project(points[tracks.track], tracks.frame)
    spread = PRIOR * float(np.median(np.abs(inside[:, 2])))
    prior = Prior(before, spread) if rich.sum() > 2 else None
    for _ in range(ROUNDS):
        cameras, points = adjust(cameras, tracks, points, lens, prior)
        errors = reprojection_errors(tracks, cameras, points)
        tracks, kept = tracks.keep(errors < max(2.0, 3 * float(np.median(errors))))
        points = points[kept]
        if not len(tracks):
            return before
    return _anchored(before, cameras if moved.all() else _in_place(before, cameras, moved))


def _in_place(before: Cameras, after: Cameras, moved: np.ndarray) -> Cameras:
    """The adjusted cameras, aligned as a whole to their previous poses in the mean.

    Nothing but the camera centres ties them to the unadjusted ones: if centres are nearly collinear, all could rotate.
    """
    old, new = (c.cam_from_world[moved, :3, :3] for c in (before, after))
    u, _, vt = np.linalg.svd(np.einsum("sba,sbc->ac", old, new))
    turn = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    was, now = before.centres()[moved], after.centres()[moved] @ turn.T
    spread = now - now.mean(axis=0)
    scale = float((spread * (was - was.mean(axis=0))).sum() / max(float((spread**2).sum()), 1e-300))
    centres = was.mean(axis=0) + (scale if scale > 0 else 1.0) * spread
    poses = after.cam_from_world.copy()
    poses[moved, :3, :3] = new @ turn.T
    poses[moved, :3, 3] = -np.einsum("sab,sb->sa", poses[moved, :3, :3], centres)
    return replace(after, cam_from_world=poses)


def _anchored(before: Cameras, after: Cameras) -> Cameras:
    """The same with the first camera at its old pose, and the others at the same mean distance from it as before."""
    old, new = (np.linalg.norm(c.centres() - c.centres()[:1], axis=1).sum() for c in (before, after))
    scale = old / new if new > 0 and old > 0 else 1.0
    poses = after.cam_from_world @ np.linalg.inv(after.cam_from_world[0])  # in the axes of the first camera
    poses[:, :3, 3] *= scale
    return replace(after, cam_from_world=poses @ before.cam_from_world[0])


def _motion(before: Cameras, after: Cameras) -> tuple[float, float]:
    turn = np.einsum("sab,scb->sac", before.cam_from_world[:, :3, :3], after.cam_from_world[:, :3, :3])
    angle = np.degrees(np.arccos(((np.trace(turn, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))
    return float(np.median(angle)), float(np.median(np.linalg.norm(before.centres() - after.centres(), axis=1)))


def _follow(scene: S, after: Cameras) -> S:
    """The scene with these cameras, its depth scaled to the triangulated tracks, and the tracks that agree."""
    assert scene.tracks is not None
    points = triangulate(scene.tracks, after)
    errors = reprojection_errors(scene.tracks, after, points)
    tracks, kept = scene.tracks.keep(errors < max(2.0, 3 * float(np.median(errors))))
    points = points[kept]
    intrinsics, factors = [], []
    for i, (transform, own) in enumerate(zip(scene.transforms, tracks.of_each(len(scene)), strict=True)):
        matrix = transform.intrinsics_to_original(scene.intrinsics[i].double())
        matrix[0, 0], matrix[1, 1] = after.focal[i].tolist()
        intrinsics.append(transform.intrinsics_to_network(matrix))
        at = transform.pixels_to_network(torch.from_numpy(tracks.pixels[own]))
        _, inside = after.project(points[tracks.track[own]], tracks.frame[own])
        ratio = inside[:, 2] / sample_depth(scene, i, at).numpy()
        ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
        factors.append(float(np.median(ratio)) if len(ratio) >= LEAST_OBSERVATIONS else float("nan"))
    usual = float(np.nanmedian(factors)) if np.isfinite(factors).any() else 1.0
    factor = torch.tensor(factors, dtype=torch.float32).nan_to_num(usual)
    depth = scene.depth * factor[:, None, None]
    poses = torch.from_numpy(after.cam_from_world).float()
    matrices = torch.stack(intrinsics).float()
    world = unproject_frames(depth, matrices, poses).masked_fill_(~scene.mask[..., None], 0.0)
    return replace(scene, cam_from_world=poses, intrinsics=matrices, depth=depth, points_world=world, tracks=tracks)
