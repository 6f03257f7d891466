"""Sampling lattices: one patch of a grid in so many, evenly spread, at different places in every frame and head."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=512)
def lattice(grid: tuple[int, int], stride: int, phase: int, *, even: bool = False) -> np.ndarray:  # [c], ascending
    """The patches sampled by one phase: (x, y) where x + shear * y + phase is a multiple of the stride.

    Args:
        grid: Patches of a frame.
        stride: One in so many is sampled.
        phase: From 0.
        even: All phases get equally many, at least one: larger phases give patches to smaller ones nearby; the
            remainder, fewer patches than the stride, is not sampled.
    """
    rows, columns = np.indices(grid)
    place = ((columns + shear(stride) * rows + phase) % stride).ravel()
    if not even:
        return np.flatnonzero(place == 0)
    patches, number = len(place), (-phase) % stride
    # Counted from the same phase, whichever is requested, so that they do not overlap.
    order = np.argsort((place - phase) % stride, kind="stable")
    return np.sort(order[number * patches // stride :][: max(1, patches // stride)])


def phase(stride: int, frame: int, head: int = 0, heads: int = 1) -> int:
    """The phase with which one head samples one frame.

    The phases of ``stride`` consecutive frames are all different, those of neighbours far apart; those of the heads are
    evenly spread, so that ``stride`` heads together see every patch.
    """
    return (frame * phase_step(stride) + head * stride // heads) % stride


@lru_cache(maxsize=128)
def shear(stride: int) -> int:
    """The shear that maximises the smallest distance between points of the lattice."""

    sheared = np.arange(stride)
    # Row by row, the smallest squared distance to the origin. No lattice has a larger smallest distance than the
    # hexagonal one.
    nearest = np.full(stride, stride**2)
    for y in range(1, math.isqrt(2 * stride) + 1):
        x = sheared * y % stride
        nearest = np.minimum(nearest, np.minimum(x, stride - x) ** 2 + y**2)
    return int(nearest.argmax())


@lru_cache(maxsize=128)
def phase_step(stride: int) -> int:
    """From one frame's phase to the next: coprime to the stride, and near its golden section."""
    golden = stride * (math.sqrt(5) - 1) / 2
    coprime = [step for step in range(1, max(2, stride)) if math.gcd(step, stride) == 1]
    return min(coprime, key=lambda step: abs(step - golden))
