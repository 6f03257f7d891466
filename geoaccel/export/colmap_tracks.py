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
"""Degrees between two rays of a point: from nearly parallel ones nothing is known of its depth. COLMAP's mapper leaves
out the same."""


@dataclass(frozen=True, eq=False)
class Triangulated:
    """Points that make a model.

    Attributes:
        tracks: Where each was measured.
        points: [N, 3].
        errors: Mean distance of each from where it was measured [N], in pixels.
    """

    tracks: Tracks
    points: np.ndarray
    errors: np.ndarray

    def colors(self, scene: Scene) -> np.ndarray:  # [N, 3] uint8
        """What the first image of each track shows there."""
        tracks = self.tracks
        first = np.searchsorted(tracks.track, np.arange(len(tracks)))
        frame, row, column = network_pixels(scene, tracks.frame[first], tracks.pixels[first])
        return (scene.images[frame, :, row, column].clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def useful_points(scene: Scene) -> Triangulated | None:
    """The points of tracks that make a model; None where there are too few.

    An observation that masks leave out is none; one of a point behind the camera is left out, as bundle adjustment goes
    astray on it, and so is a track whose rays are nearly parallel.
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
