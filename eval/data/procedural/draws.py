"""Random numbers of a scene: they depend only on its seed, not on the rest of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

SCENE_STREAM, CAMERA_STREAM = 0, 1


def uniform_block(seeds: Sequence[int], stream: int, count: int) -> Array:  # [B, count]
    """Uniform numbers in [0, 1), one row per seed. A longer block starts with the shorter one."""
    rows = [np.random.Generator(np.random.Philox(key=(seed, stream))).random(count) for seed in seeds]
    return np.stack(rows)


class Draws:
    """Hands out the numbers of a block ``[B, count]`` in a fixed order, for all scenes at once.

    Drawing for the whole batch keeps the cost of a scene close to that of its generator: a loop of scalar draws would
    take longer than rendering the scene on a GPU.
    """

    def __init__(self, block: Array):
        self._block = block
        self._used = 0

    def uniform(self, low: ArrayLike, high: ArrayLike, *shape: int) -> Array:  # [B, *shape]
        count = math.prod(shape)
        assert self._used + count <= self._block.shape[1], "the block of random numbers is too short"
        values = self._block[:, self._used : self._used + count].reshape(-1, *shape)
        self._used += count
        return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * values

    def normal(self, *shape: int) -> Array:  # [B, *shape]
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(0.0, 1.0, *shape)))
        return radius * np.cos(self.uniform(0.0, 2.0 * np.pi, *shape))

    def flag(self, probability: float, *shape: int) -> NDArray[np.bool_]:  # [B, *shape]
        return self.uniform(0.0, 1.0, *shape) < probability

    def permutation(self, size: int) -> NDArray[np.int64]:  # [B, size]
        return np.argsort(self.uniform(0.0, 1.0, size), axis=-1)

    def direction(self, *shape: int) -> Array:  # [B, *shape, 3], uniform on the sphere
        vector = self.normal(*shape, 3)
        return vector / np.linalg.norm(vector, axis=-1, keepdims=True)

    def rotation(self, *shape: int) -> Array:  # [B, *shape, 3, 3], uniform
        quaternion = self.normal(*shape, 4)
        w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
        rows = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    def color(
        self,
        *shape: int,
        saturation: tuple[ArrayLike, ArrayLike] = (0.45, 0.95),
        value: tuple[ArrayLike, ArrayLike] = (0.35, 1.0),
    ) -> Array:  # [B, *shape, 3], RGB
        """Colours of any hue."""
        hue = self.uniform(0.0, 6.0, *shape)[..., None]
        saturated = self.uniform(*saturation, *shape)[..., None]
        bright = self.uniform(*value, *shape)[..., None]
        wheel = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
        return bright * (1.0 - saturated * (1.0 - wheel))


def yaw_rotation(angle: Array) -> Array:  # [..., 3, 3]
    """Rotation about the world's up axis z."""
    cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    rows = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
