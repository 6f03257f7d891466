"""Measured tracks as the points of a COLMAP model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from geoaccel.scene import Scene
from geoaccel.tracks import LEAST_TRACKS, Cameras, Tracks, reprojection_errors, triangulate, without_short
from geoaccel.tracks.selected import network_pixels, selected_tracks
from geoaccel.tracks.triangulate import widest_angles

LEAST_ANGLE = 1.5
"""Least angle in degrees between two rays of a point: nearly parallel rays do not determine depth. COLMAP's mapper uses
the same."""


@dataclass(frozen=True, eq=False)
class Triangulated:
    """Triangulated points of a model.

    Attributes:
        tracks: Their tracks.
        points: [N, 3].
        errors: Mean reprojection error of each [N], in pixels.
    """

    tracks: Tracks
    points: np.ndarray
    errors: np.ndarray

    def colors(self, scene: Scene) -> np.ndarray:  # [N, 3] uint8
        """Colours from the first image of each track."""
        tracks = self.tracks
        first = np.searchsorted(tracks.track, np.arange(len(tracks)))
        frame, row, column = network_pixels(scene, tracks.frame[first], tracks.pixels[first])
        return (scene.images[frame, :, row, column].clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def useful_points(scene: Scene) -> Triangulated | None:
    """The triangulated tracks suitable for a model; None if there are too few.

    Leaves out observations excluded by masks, observations of points behind the camera, on which bundle adjustment
    diverges, and tracks with nearly parallel rays.
    """
    if scene.tracks is None:
        return None
    cameras, tracks = Cameras.of(scene), without_short(selected_tracks(scene, scene.tracks), len(scene))
    while len(tracks):
        points = triangulate(tracks, cameras)
        errors = reprojection_errors(tracks, cameras, points)
        if np.isfinite(errors).all():
            break
        tracks, _ = tracks.keep(np.isfinite(errors))
    if not len(tracks):
        return None
    wide = widest_angles(tracks, cameras, points) >= LEAST_ANGLE
    kept = wide[tracks.track]
    tracks, points, errors = tracks.where(wide), points[wide], errors[kept]
    if len(tracks) < LEAST_TRACKS:
        return None
    mean = np.bincount(tracks.track, errors, minlength=len(tracks)) / tracks.lengths()
    return Triangulated(tracks, points, mean)
