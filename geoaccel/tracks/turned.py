"""Photographs of one camera that was held in two ways: those that stand are laid like the others, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from geoaccel.tracks.table import Tracks
from geoaccel.tracks.triangulate import Cameras

QUARTER = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
"""Axes of a camera before a quarter turn to axes after it: down becomes right."""


def turned_images(cameras: Cameras) -> np.ndarray:  # [S] bool
    """Images that have another size than the first one."""
    return np.array([size != cameras.sizes[0] for size in cameras.sizes])


def of_one_camera(cameras: Cameras) -> bool:
    """Whether all focal lengths are the same, and all sizes, up to a quarter turn."""
    turned = turned_images(cameras)[:, None]
    focal = np.where(turned, cameras.focal[:, ::-1], cameras.focal)
    same_size = len({tuple(sorted(size)) for size in cameras.sizes}) == 1
    return same_size and bool(np.ptp(focal, axis=0).max() < 1e-3 * focal.max())


def laid(cameras: Cameras, tracks: Tracks) -> tuple[Cameras, Tracks]:
    """Cameras and tracks as if turned images were taken like the first one; the world stays."""
    turned = turned_images(cameras)
    widths = np.array([width for _, width in cameras.sizes])
    u, v = tracks.pixels.T
    pixels = np.stack([v, widths[tracks.frame] - u], axis=1)
    there = np.stack([cameras.centre[:, 1], widths - cameras.centre[:, 0]], axis=1)
    centre = np.where(turned[:, None], there, cameras.centre)
    poses, focal = np.where(turned[:, None, None], QUARTER, np.eye(4)) @ cameras.cam_from_world, cameras.focal
    focal = np.where(turned[:, None], focal[:, ::-1], focal)
    lying = Cameras(poses, focal, centre, [cameras.sizes[0]] * len(turned))
    return lying, replace(tracks, pixels=np.where(turned[tracks.frame][:, None], pixels, tracks.pixels))


def stood(lying: Cameras, before: Cameras) -> Cameras:
    """What became of laid cameras, for the images as they were before."""
    turned = turned_images(before)
    poses = np.where(turned[:, None, None], QUARTER.T, np.eye(4)) @ lying.cam_from_world
    return replace(before, cam_from_world=poses, focal=np.where(turned[:, None], lying.focal[:, ::-1], lying.focal))
