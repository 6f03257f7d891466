"""Scenes with wrong cameras, and tracks that put them right: exact ones, and photographs to measure them in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.eval.data.synthetic import sequence
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.images import ImageTransform
from geoaccel.reconstruction import Reconstruction
from geoaccel.tracks import Cameras, Tracks


def rendered(seed: int, *, frames: int, size: int) -> Reconstruction:
    """A rendered scene with its true cameras and depth."""
    batch = sequence(seed, frames=frames, size=(size, size))
    depth, intrinsics, poses = batch.depth[0], batch.intrinsics[0], batch.cam_from_world[0]
    pictures = (batch.images[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Reconstruction(
        cam_from_world=poses,
        intrinsics=intrinsics,
        depth=depth,
        points_world=unproject_depth(depth, intrinsics, poses),
        conf=torch.ones_like(depth),
        images=batch.images[0],
        mask=depth > 0,
        names=[f"{i}.png" for i in range(frames)],
        transforms=[ImageTransform((size, size), (size, size), (1.0, 1.0), (0.0, 0.0))] * frames,
        paths=[None] * frames,
        read_original=lambda i: pictures[i],
    )


def spoiled(scene: Reconstruction, *, degrees: float = 1.0, share: float = 0.02, seed: int = 0) -> Reconstruction:
    """The scene with every camera turned by an angle and moved by a share of the median depth, at random."""
    generator = torch.Generator().manual_seed(seed)
    world_from_cam = invert_rigid(scene.cam_from_world.double())
    for pose in world_from_cam:
        x, y, z = (_direction(generator) * np.radians(degrees)).tolist()
        cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        pose[:3, :3] = pose[:3, :3] @ torch.linalg.matrix_exp(cross)
        pose[:3, 3] += _direction(generator) * share * scene.depth[scene.mask].median()
    poses = invert_rigid(world_from_cam).float()
    points = unproject_depth(scene.depth, scene.intrinsics, poses)
    return replace(scene, cam_from_world=poses, points_world=points)


def exact_tracks(scene: Reconstruction, count: int = 150) -> Tracks:
    """Projections of points of the true scene into every image that sees them."""
    cameras = Cameras.of(scene)
    generator = torch.Generator().manual_seed(0)
    frame, row, column = scene.mask.nonzero(as_tuple=True)
    chosen = torch.randperm(len(frame), generator=generator)[:count]
    points = scene.points_world[frame[chosen], row[chosen], column[chosen]].double().numpy()
    height, width = scene.depth.shape[1:]
    seen = []
    for i in range(len(scene)):
        pixels, inside = cameras.project(points, np.full(count, i))
        with np.errstate(invalid="ignore"):
            good = (pixels >= 0).all(1) & (pixels < (width, height)).all(1) & (inside[:, 2] > 0)
        at = np.where(good[:, None], pixels, 0).astype(int)
        depth = scene.depth[i].numpy()[at[:, 1], at[:, 0]]
        good &= np.abs(inside[:, 2] - depth) < 0.02 * depth
        seen += [(n, i, *pixels[n]) for n in np.flatnonzero(good)]
    seen.sort()
    table = np.array(seen)
    tracks = Tracks(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:], "truth")
    return tracks.keep(np.ones(len(table), bool))[0]


def auc_5(poses: Tensor, truth: Tensor) -> float:
    """Of one scene."""
    rotation, translation = relative_pose_errors(poses, truth)
    return auc(torch.maximum(rotation, translation), 5)


def _direction(generator: torch.Generator) -> Tensor:  # [3]
    return torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
