"""Choice of image pairs: all pairs of few images, else neighbours in order and by predicted overlap."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from geoaccel.cameras import pixel_grid, project_points
from geoaccel.scene import Scene
from geoaccel.tracks.predicted import lift, likely

ALL_UP_TO = 16  # images
IN_ORDER, BY_OVERLAP = 4, 8
GRID = 12


def choose_pairs(scene: Scene) -> list[tuple[int, int]]:
    """Pairs (i, j) with i < j."""
    count = len(scene)
    if count <= ALL_UP_TO:
        return list(itertools.combinations(range(count), 2))
    pairs = {(i, j) for i in range(count) for j in range(i + 1, min(count, i + 1 + IN_ORDER))}
    for i, shared in enumerate(predicted_overlap(scene)):
        pairs |= {(min(i, j), max(i, j)) for j in np.argsort(-shared)[:BY_OVERLAP].tolist() if shared[j] > 0}
    return sorted(pairs)


def predicted_overlap(scene: Scene) -> Iterator[np.ndarray]:  # S times [S]
    """For each image in turn, the fraction of it that each other image is predicted to see."""
    intrinsics, poses = scene.intrinsics.double(), scene.cam_from_world.double()
    every = torch.arange(len(scene))[:, None]
    for i, transform in enumerate(scene.transforms):
        height, width = transform.original_size
        pixels = pixel_grid(GRID, GRID).double().numpy().reshape(-1, 2) * (width / GRID, height / GRID)
        at, z = project_points(lift(scene, i, pixels), intrinsics, poses)
        shared = likely(scene, every, at, z).double().mean(dim=1).numpy()
        shared[i] = 0.0
        yield shared
