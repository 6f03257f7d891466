"""Sampling lattices: one patch of a grid in so many, evenly spread, at other places in every frame and head."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=128)
def phases(grid: tuple[int, int], stride: int) -> Tensor:  # [stride, c], int64, ascending
    """The patches that each phase of a lattice samples: one in ``stride``, as many for every phase, at least one.

    Patch (x, y) belongs to phase (x + shear * y) % stride. Where phases have different numbers of patches the nearest
    ones give some to the others, and what is left over, fewer patches than the stride, belongs to none.
    """
    rows = torch.arange(grid[0])[:, None]
    columns = torch.arange(grid[1])[None]
    order = ((columns + shear(stride) * rows) % stride).flatten().argsort(stable=True)
    each, patches = max(1, len(order) // stride), len(order)
    return torch.stack([order[p * patches // stride :][:each].sort().values for p in range(stride)])


def phase(stride: int, frame: int, head: int = 0, heads: int = 1) -> int:
    """The phase by which one head samples one frame.

    Those of ``stride`` frames that follow one another are all different, and those of neighbours far apart; those of
    the heads are spread evenly, so that as many heads as the stride see every patch.
    """
    return (frame * phase_step(stride) + head * stride // heads) % stride


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
