"""Triangulation of tracks, and reprojection errors. In float64, in pixels of the original images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geoaccel.scene import Scene
from geoaccel.tracks.table import Tracks

ITERATIONS = 12
ROBUST_PIXELS = 2.0


@dataclass(frozen=True, eq=False)
class Cameras:
    """Pinhole cameras of S original images.

    Attributes:
        cam_from_world: [S, 4, 4].
        focal: fx, fy [S, 2].
        centre: cx, cy [S, 2].
        sizes: (H, W) of each image.
    """

    cam_from_world: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    sizes: list[tuple[int, int]]

    @classmethod
    def of(cls, scene: Scene) -> Cameras:
        """Those of a scene."""
        intrinsics = scene.original_intrinsics().double().numpy()
        sizes = [transform.original_size for transform in scene.transforms]
        focal = intrinsics[:, [0, 1], [0, 1]]
        return cls(scene.cam_from_world.double().numpy(), focal, intrinsics[:, :2, 2], sizes)

    def centres(self) -> np.ndarray:  # [S, 3]
        """Camera centres in the world."""
        return -np.einsum("sba,sb->sa", self.cam_from_world[:, :3, :3], self.cam_from_world[:, :3, 3])

    def project(
        self,
        points: np.ndarray,  # [M, 3], world
        frame: np.ndarray,  # [M]
    ) -> tuple[np.ndarray, np.ndarray]:  # [M, 2], [M, 3]
        """Pixels of points, each in one camera, and the points in camera coordinates."""
        pose = self.cam_from_world[frame]
        inside = np.einsum("mab,mb->ma", pose[:, :3, :3], points) + pose[:, :3, 3]
        with np.errstate(all="ignore"):
            return inside[:, :2] / inside[:, 2:] * self.focal[frame] + self.centre[frame], inside


def triangulate(tracks: Tracks, cameras: Cameras) -> np.ndarray:  # [N, 3]
    """The point of each track: nearest to its rays, then refined by robust reprojection error."""
    points = _nearest_to_rays(tracks, cameras)
    error, damping = _cost(tracks, cameras, points), np.full(len(tracks), 1e-3)
    for _ in range(ITERATIONS):
        trial = points - _step(tracks, cameras, points, damping)
        changed = _cost(tracks, cameras, trial)
        better = changed < error
        points = np.where(better[:, None], trial, points)
        error = np.where(better, changed, error)
        damping = np.where(better, damping * 0.1, damping * 10)
    return points


def reprojection_errors(
    tracks: Tracks,
    cameras: Cameras,
    points: np.ndarray,  # [N, 3]
) -> np.ndarray:  # [M], pixels; infinite behind the camera
    """Distance of each observation from the projection of its point."""
    projected, inside = cameras.project(points[tracks.track], tracks.frame)
    error = np.linalg.norm(projected - tracks.pixels, axis=1)
    return np.where((inside[:, 2] > 0) & np.isfinite(error), error, np.inf)


def widest_angles(
    tracks: Tracks,
    cameras: Cameras,
    points: np.ndarray,  # [N, 3]
) -> np.ndarray:  # [N], degrees
    """The largest angle at each point between the directions to two cameras that see it."""
    rays = cameras.centres()[tracks.frame] - points[tracks.track]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True).clip(1e-300)
    lengths, starts = tracks.lengths(), np.searchsorted(tracks.track, np.arange(len(tracks)))
    least = np.ones(len(tracks))
    for length in np.unique(lengths).tolist():
        own = np.flatnonzero(lengths == length)
        of_track = rays[starts[own, None] + np.arange(length)]
        least[own] = (of_track @ of_track.transpose(0, 2, 1)).min(axis=(1, 2))
    return np.degrees(np.arccos(least.clip(-1, 1)))


def _nearest_to_rays(tracks: Tracks, cameras: Cameras) -> np.ndarray:  # [N, 3]
    frame = tracks.frame
    rays = np.ones((len(frame), 3))
    rays[:, :2] = (tracks.pixels - cameras.centre[frame]) / cameras.focal[frame]
    rays = np.einsum("mba,mb->ma", cameras.cam_from_world[frame, :3, :3], rays)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    across = np.eye(3) - rays[:, :, None] * rays[:, None]
    target = np.einsum("mab,mb->ma", across, cameras.centres()[frame])
    matrix = _sum(across, tracks) + 1e-9 * np.eye(3)  # regularises parallel rays
    return np.linalg.solve(matrix, _sum(target, tracks)[..., None])[..., 0]


def _cost(tracks: Tracks, cameras: Cameras, points: np.ndarray) -> np.ndarray:  # [N]
    error = reprojection_errors(tracks, cameras, points)
    return _sum(np.log1p((error.clip(max=1e6) / ROBUST_PIXELS) ** 2), tracks)


def _step(tracks: Tracks, cameras: Cameras, points: np.ndarray, damping: np.ndarray) -> np.ndarray:  # [N, 3]
    frame = tracks.frame
    projected, inside = cameras.project(points[tracks.track], frame)
    x, y, z = inside.T
    z = np.where(np.abs(z) < 1e-12, 1e-12, z)
    slope = np.zeros((len(frame), 2, 3))
    slope[:, 0, 0] = slope[:, 1, 1] = 1 / z
    slope[:, 0, 2], slope[:, 1, 2] = -x / z**2, -y / z**2
    slope = cameras.focal[frame][:, :, None] * slope @ cameras.cam_from_world[frame, :3, :3]
    residual = np.nan_to_num(projected - tracks.pixels)
    weight = 1 / (1 + (residual**2).sum(-1) / ROBUST_PIXELS**2)
    matrix = _sum(np.einsum("m,mak,mal->mkl", weight, slope, slope), tracks)
    target = _sum(np.einsum("m,mak,ma->mk", weight, slope, residual), tracks)
    matrix = matrix + (damping * np.trace(matrix, axis1=1, axis2=2) + 1e-12)[:, None, None] * np.eye(3)
    return np.linalg.solve(matrix, target[..., None])[..., 0]


def _sum(values: np.ndarray, tracks: Tracks) -> np.ndarray:
    """Sum over the observations of each track, which are contiguous."""
    starts = np.searchsorted(tracks.track, np.arange(len(tracks)))
    return np.add.reduceat(values, starts, axis=0) if len(tracks) else values
