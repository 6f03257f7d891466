"""Sampling lattices: one patch of a grid in so many, evenly spread, at other places in every frame."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def lattice_mask(grid: tuple[int, int], stride: int, frame: int) -> Tensor:  # [h, w], bool
    """True for the patches of one frame that are sampled, one in ``stride``.

    A patch (x, y) is sampled where x + shear * y + phase is a multiple of the stride. The phases of ``stride`` frames
    that follow one another are all different, and those of neighbours far apart.
    """
    rows = torch.arange(grid[0])[:, None]
    columns = torch.arange(grid[1])[None]
    return (columns + shear(stride) * rows + frame * phase_step(stride)) % stride == 0


@lru_cache(maxsize=128)
def shear(stride: int) -> int:
    """The shear whose lattice has its nearest points farthest apart."""

    def nearest(sheared: int) -> float:
        reach = range(-stride, stride + 1)
        steps = ((x, y) for y in range(stride + 1) for x in reach if (x + sheared * y) % stride == 0)
        return min(math.hypot(x, y) for x, y in steps if (x, y) != (0, 0))

    return max(range(stride), key=nearest)


@lru_cache(maxsize=128)
def phase_step(stride: int) -> int:
    """From one frame's phase to the next: coprime to the stride, and near its golden section."""
    golden = stride * (math.sqrt(5) - 1) / 2
    coprime = [step for step in range(1, max(2, stride)) if math.gcd(step, stride) == 1]
    return min(coprime, key=lambda step: abs(step - golden))
