"""Sampling lattices: one patch of a grid in so many, evenly spread, at other places in every frame and head."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=512)
def lattice(grid: tuple[int, int], stride: int, phase: int, *, even: bool = False) -> np.ndarray:  # [c], ascending
    """The patches that one phase samples: (x, y) where x + shear * y + phase is a multiple of the stride.

    Args:
        grid: Patches of a frame.
        stride: One in so many is sampled.
        phase: From 0.
        even: All phases have equally many, one at least: the nearest phases give some of theirs to smaller ones, and
            what is left over, fewer patches than the stride, is sampled by none.
    """
    rows, columns = np.indices(grid)
    place = ((columns + shear(stride) * rows + phase) % stride).ravel()
    if not even:
        return np.flatnonzero(place == 0)
    patches, number = len(place), (-phase) % stride
    # Counted from the same phase, whichever is asked for, so that they do not overlap.
    order = np.argsort((place - phase) % stride, kind="stable")
    return np.sort(order[number * patches // stride :][: max(1, patches // stride)])


def phase(stride: int, frame: int, head: int = 0, heads: int = 1) -> int:
    """The phase by which one head samples one frame.

    Those of ``stride`` frames that follow one another are all different, and those of neighbours far apart; those of
    the heads are spread evenly, so that as many heads as the stride see every patch.
    """
    return (frame * phase_step(stride) + head * stride // heads) % stride


@lru_cache(maxsize=128)
def shear(stride: int) -> int:
    """The shear whose lattice has its nearest points farthest apart."""

    sheared = np.arange(stride)
    # One row at a time: the point of a row that is nearest to the first one's, squared. No lattice has all of its
    # points farther apart than the hexagonal one.
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
