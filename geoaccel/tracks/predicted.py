"""Predicted geometry of pixels: their depth, and their projections into other images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, project_points, transform_points
from geoaccel.scene import Scene


@dataclass(frozen=True, eq=False)
class Seen:
    """Projections of points into an image.

    Attributes:
        pixels: [K, 2], in the original image.
        likely: [K] bool; in front of the camera, within the image, and not occluded in the prediction.
    """

    pixels: np.ndarray
    likely: np.ndarray


HIDDEN = 0.1  # fraction by which a point may lie behind the depth of a pixel without counting as occluded


def lift(
    scene: Scene,
    frame: int,
    pixels: np.ndarray,  # [K, 2], original image
) -> Tensor:  # [K, 3], float64; NaN where there is no depth
    """World points under pixels of one image."""
    transform, intrinsics = scene.transforms[frame], scene.intrinsics[frame].double()
    at = transform.pixels_to_network(torch.from_numpy(pixels))
    depth = sample_depth(scene, frame, at)
    rays = (at - intrinsics[:2, 2]) / intrinsics.diagonal()[:2]
    points = torch.cat([rays, torch.ones_like(rays[:, :1])], dim=-1) * depth[:, None]
    return transform_points(invert_rigid(scene.cam_from_world[frame].double()), points)


def see(
    scene: Scene,
    frame: int,
    points: Tensor,  # [K, 3], float64
) -> Seen:
    """Project world points into one image."""
    at, z = project_points(points, scene.intrinsics[frame].double(), scene.cam_from_world[frame].double())
    return Seen(scene.transforms[frame].pixels_to_original(at).numpy(), likely(scene, frame, at, z).numpy())


def likely(
    scene: Scene,
    frame: int | Tensor,  # one, or [..., 1]
    at: Tensor,  # [..., K, 2], network pixels
    z: Tensor,  # [..., K], depth of the points
) -> Tensor:  # [..., K] bool
    """Whether points are visible in images, as in `Seen`."""
    return (z > 0) & (z < (1 + HIDDEN) * sample_depth(scene, frame, at))


def sample_depth(
    scene: Scene,
    frame: int | Tensor,  # one, or [..., 1]
    at: Tensor,  # [..., K, 2], network pixels
) -> Tensor:  # [..., K], float64
    """Depth of the pixel that contains each position; NaN outside, and where there is none."""
    height, width = scene.depth.shape[1:]
    u, v = at.unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)  # False for NaN
    column, row = u.where(inside, 0.0).long(), v.where(inside, 0.0).long()
    known = inside & scene.mask[frame, row, column]
    return scene.depth[frame, row, column].double().where(known, torch.nan)
