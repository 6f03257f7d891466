"""A point cloud that is downsampled as it grows: the most confident point of every voxel is kept.

Points are selected, with the pixel that each comes from, and not averaged: a point of a COLMAP model lies exactly on
its pixel. Only NumPy is used, so that the same windows give the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np

GROWTH = 2 ** (1 / 3)
"""Growth factor of voxels if there are too many points: two steps leave about half of the points of a surface."""
BITS = 20
"""Largest voxel index along each axis, in each direction."""
BATCH = 500_000
"""Points collected before downsampling."""

POINT = np.dtype(
    [
        ("key", "<u8"),
        ("xyz", "<f4", 3),
        ("rgb", "u1", 3),
        ("rank", "u1"),
        ("frame", "<i4"),
        ("pixel", "<f4", 2),
    ]
)
"""A point: voxel, position, colour, confidence rank, and the pixel it comes from."""


class Voxels:
    """Points, at most one per voxel.

    Args:
        side: Side of a voxel, in the unit of the points. It grows if there are more than `most` points.
        most: Most points to keep; None: no limit.

    Attributes:
        seen: Number of points added.
    """

    def __init__(self, side: float, most: int | None) -> None:
        self.side, self.most, self.seen = side, most, 0
        self._kept, self._new = np.empty(0, POINT), [np.empty(0, POINT)]

    def add(
        self,
        xyz: np.ndarray,  # [N, 3]
        rgb: np.ndarray,  # [N, 3], uint8
        rank: np.ndarray,  # [N], uint8
        frame: int,
        pixel: np.ndarray,  # [N, 2]
    ) -> None:
        """Add the points of one frame."""
        points = np.empty(len(xyz), POINT)
        points["xyz"], points["rgb"], points["rank"], points["frame"], points["pixel"] = xyz, rgb, rank, frame, pixel
        self._new.append(points)
        self.seen += len(points)
        if sum(map(len, self._new)) >= BATCH:
            self._thin()

    def points(self) -> np.ndarray:  # [M], `POINT`
        """The points left, sorted by frame."""
        self._thin()
        order = np.lexsort((self._kept["pixel"][:, 0], self._kept["pixel"][:, 1], self._kept["frame"]))
        return self._kept[order]

    def _thin(self) -> None:
        points = np.concatenate([self._kept, *self._new])
        self._new = []
        points = self._surest(points)
        while self.most is not None and len(points) > self.most:
            self.side *= GROWTH
            points = self._surest(points)
        self._kept = points

    def _surest(self, points: np.ndarray) -> np.ndarray:
        cube = np.floor(points["xyz"].astype(np.float64) / self.side)
        cube = (cube.clip(-(2**BITS), 2**BITS - 1) + 2**BITS).astype(np.uint64)
        points["key"] = (cube[:, 0] << np.uint64(2 * BITS + 2)) | (cube[:, 1] << np.uint64(BITS + 1)) | cube[:, 2]
        # Ties go to earlier points: sorting is stable, and they come first.
        points = points[np.lexsort((-points["rank"].astype(np.int16), points["key"]))]
        first = np.ones(len(points), bool)
        first[1:] = points["key"][1:] != points["key"][:-1]
        return points[first]
