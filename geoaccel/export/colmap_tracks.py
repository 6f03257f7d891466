"""Measured tracks as the points of a COLMAP model."""

from __future__ import annotations

import numpy as np
import torch

from geoaccel.scene import Scene
from geoaccel.tracks import LEAST_TRACKS, Cameras, Tracks, reprojection_errors, triangulate, without_short
from geoaccel.tracks.predicted import lift

UNKNOWN = -1.0  # COLMAP's error of a point that has none


def useful_tracks(scene: Scene) -> Tracks | None:
    """The tracks that make a model; None where there are too few."""
    if scene.tracks is None:
        return None
    tracks = without_short(scene.tracks, len(scene))
    return tracks if len(tracks) >= LEAST_TRACKS else None


def points_of_tracks(scene: Scene, tracks: Tracks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [N, 3], colours [N, 3] uint8, and the mean distance of each from where it was measured [N], in pixels.

    A point that no place in front of all its cameras explains lies where the first image's depth has it, or else where
    its rays pass nearest to each other.
    """
    cameras = Cameras.of(scene)
    points = triangulate(tracks, cameras)
    errors = reprojection_errors(tracks, cameras, points)
    first = np.searchsorted(tracks.track, np.arange(len(tracks)))
    bad = np.bincount(tracks.track, ~np.isfinite(errors), minlength=len(tracks)) > 0
    colors = np.empty((len(tracks), 3), np.uint8)
    for i, transform in enumerate(scene.transforms):
        own = np.flatnonzero(tracks.frame[first] == i)
        pixels = tracks.pixels[first[own]]
        lifted = lift(scene, i, pixels).numpy()
        moved = bad[own] & np.isfinite(lifted).all(-1)
        points[own[moved]] = lifted[moved]
        at = transform.pixels_to_network(torch.from_numpy(pixels)).long()
        height, width = scene.depth.shape[1:]
        column, row = at[:, 0].clamp(0, width - 1), at[:, 1].clamp(0, height - 1)
        colors[own] = (scene.images[i, :, row, column].T.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    errors = reprojection_errors(tracks, cameras, points)
    mean = np.bincount(tracks.track, errors, minlength=len(tracks)) / tracks.lengths()
    return points, colors, np.where(np.isfinite(mean), mean, UNKNOWN)
