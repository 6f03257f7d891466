"""Which images are compared: all with all where they are few, else neighbours in order and by predicted overlap."""

from __future__ import annotations

import itertools

import numpy as np

from geoaccel.cameras import pixel_grid
from geoaccel.scene import Scene
from geoaccel.tracks.predicted import lift, see

ALL_UP_TO = 16  # images
IN_ORDER, BY_OVERLAP = 4, 8
GRID = 12


def choose_pairs(scene: Scene) -> list[tuple[int, int]]:
    """Pairs (i, j) with i < j."""
    count = len(scene)
    if count <= ALL_UP_TO:
        return list(itertools.combinations(range(count), 2))
    pairs = {(i, j) for i in range(count) for j in range(i + 1, min(count, i + 1 + IN_ORDER))}
    for i in range(count):
        shared = predicted_overlap(scene, i)
        pairs |= {(min(i, j), max(i, j)) for j in np.argsort(-shared)[:BY_OVERLAP].tolist() if shared[j] > 0}
    return sorted(pairs)


def predicted_overlap(scene: Scene, i: int) -> np.ndarray:  # [S]
    """Share of image i that each other image is predicted to see."""
    height, width = scene.transforms[i].original_size
    pixels = pixel_grid(GRID, GRID).double().numpy().reshape(-1, 2) * (width / GRID, height / GRID)
    points = lift(scene, i, pixels)
    return np.array([0.0 if i == j else see(scene, j, points).likely.mean() for j in range(len(scene))])
