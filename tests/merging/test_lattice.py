"""Which patches a lattice samples, and which rows of packed tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from geoaccel.merging.key_subset import packed_subset
from geoaccel.merging.lattice import lattice, phase, phase_step, shear


def stacked(grid: tuple[int, int], stride: int, *, even: bool) -> Tensor:  # [stride, c]
    """The lattices of all phases."""
    return torch.from_numpy(np.stack([lattice(grid, stride, p, even=even) for p in range(stride)]))


@pytest.mark.parametrize("stride", [2, 3, 4, 7, 8, 16])
def test_a_lattice_is_even_and_as_many_frames_or_heads_as_the_stride_see_every_patch_once(stride: int) -> None:
    grid = (2 * stride, 3 * stride)
    found, even = (stacked(grid, stride, even=even) for even in (False, True))
    assert torch.equal(found, even)
    assert found.shape == (stride, 6 * stride)
    for order in ([phase(stride, n) for n in range(stride)], [phase(stride, 5, n, stride) for n in range(stride)]):
        assert found[order].flatten().sort().values.tolist() == list(range(6 * stride**2))
    points = torch.stack([found[0] // grid[1], found[0] % grid[1]], -1).double()
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).min()
    # No lattice with one point in `stride` has its points farther apart than the hexagonal one: sqrt(2 / sqrt(3)) of
    # the root of the stride. Integer shears come within a third of it.
    assert nearest >= 2 / 3 * math.sqrt(2 / math.sqrt(3) * stride)


@pytest.mark.parametrize("stride", [3, 5, 6, 11, 200])
def test_even_phases_are_as_large_as_each_other_on_any_grid(stride: int) -> None:
    found = stacked((7, 9), stride, even=True)
    assert found.shape == (stride, max(1, 63 // stride))
    assert (found.diff(dim=1) > 0).all()
    assert len(found.unique()) == min(63, stride * (63 // stride) or 63)  # no patch is in two, while there are enough


@pytest.mark.parametrize("stride", [2, 6, 7, 12, 19, 40])
def test_no_other_shear_has_its_nearest_points_farther_apart(stride: int) -> None:
    def nearest(sheared: int) -> int:
        steps = ((x, y) for y in range(stride + 1) for x in range(-stride, stride + 1))
        return min(x**2 + y**2 for x, y in steps if (x, y) != (0, 0) and (x + sheared * y) % stride == 0)

    assert nearest(shear(stride)) == max(map(nearest, range(stride)))


@pytest.mark.parametrize(("heads", "stride"), [(6, 4), (6, 6), (6, 16), (16, 8)])
def test_heads_are_spread_over_the_phases(heads: int, stride: int) -> None:
    taken = {phase(stride, 3, head, heads) for head in range(heads)}
    assert len(taken) == min(heads, stride)


@pytest.mark.parametrize("stride", [4, 5, 7, 8, 12, 16, 23])
def test_neighbouring_frames_are_sampled_far_from_each_other(stride: int) -> None:
    step = phase_step(stride)
    assert min(step, stride - step) >= stride / 4


def test_packed_rows_are_sampled_at_other_places_in_the_next_frame() -> None:
    assert packed_subset((5, 4, 5), 1, 2, False) == ((0, 5, 9, 1, 3, 7, 10, 12), 5)
    assert packed_subset((5, 4, 5), 1, 2, True) == ((0, 1, 2, 3, 4, 5, 9, 7, 10, 12), 3)
