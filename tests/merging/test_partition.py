"""Targets, protected tokens and sources: cells on any grid, groups."""

from __future__ import annotations

import pytest
import torch

from geoaccel.layout import TokenLayout
from geoaccel.merging.partition import (
    Partition,
    highest,
    lowest_of_cells,
    marked,
    num_cells,
    scene_mask,
)

GRIDS = [(1, 1), (2, 2), (4, 6), (5, 7), (7, 4), (1, 5), (28, 37)]


def cell_of(grid: tuple[int, int]) -> torch.Tensor:  # [h, w]
    """Number of the cell that each patch is in."""
    rows, columns = torch.arange(grid[0]) // 2, torch.arange(grid[1]) // 2
    return rows[:, None] * (-(-grid[1] // 2)) + columns


@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_has_its_lowest_patch_and_no_other(grid: tuple[int, int]) -> None:
    score = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0))
    chosen = lowest_of_cells(score).view(3, *grid)
    cells = cell_of(grid)
    assert cells.max() + 1 == num_cells(grid)
    for frame in range(3):
        for cell in range(num_cells(grid)):
            inside = cells == cell
            assert score[frame][inside & chosen[frame]].tolist() == [score[frame][inside].min()]


def test_equal_scores_give_the_first_patch() -> None:
    assert lowest_of_cells(torch.zeros(3, 3)).tolist() == [True, False, True, False, False, False, True, False, True]
    assert highest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert not highest(torch.zeros(3), 0).any()


def test_masks_of_scenes() -> None:
    layout = TokenLayout(batch=1, frames=2, grid=(1, 2), num_special=1)
    patches = torch.tensor([[[True, False], [False, True]]])
    assert scene_mask(patches, layout, special=True).tolist() == [[True, True, False, True, False, True]]
    assert scene_mask(patches, layout, special=False, anchor=True).tolist() == [[True, True, True, False, False, True]]


def random_partition() -> tuple[Partition, torch.Tensor, torch.Tensor]:
    """Two rows of 40 tokens, 10 targets and 8 protected tokens, 4 of them targets as well."""
    order = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)).argsort(-1)
    target = torch.zeros(2, 40, dtype=torch.bool).scatter(-1, order[:, :10], True)
    protected = torch.zeros(2, 40, dtype=torch.bool).scatter(-1, order[:, 6:14], True)
    return Partition.from_masks(target, protected), target, protected


def test_parts_are_a_partition() -> None:
    partition, target, protected = random_partition()
    parts = torch.cat([partition.targets, partition.protected, partition.sources], dim=-1)
    assert torch.equal(parts.sort(-1).values, torch.arange(40).expand(2, -1))
    assert torch.equal(partition.targets, marked(target))
    assert torch.equal(partition.protected, marked(protected & ~target))


@pytest.mark.parametrize("most", [0, 1, 9, 26, 100])
def test_sources_go_to_the_most_similar_target_and_the_least_similar_stay_alone(most: int) -> None:
    partition, _, _ = random_partition()
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))
    plan = partition.assign(x, most)
    merged = min(most, 26)
    assert plan.num_groups == 40 - merged
    for row in range(2):
        sources, targets = partition.sources[row], partition.targets[row]
        similarity = torch.cosine_similarity(x[row, sources][:, None], x[row, targets][None], dim=-1)
        best, where = similarity.max(-1)
        goes = best.argsort(descending=True)[:merged].tolist()
        expected = [[token] for token in range(40)]
        for index in goes:
            expected[targets[where[index]]].append(int(sources[index]))
            expected[sources[index]] = []
        groups = plan.group_of[row]
        found = [(groups == group).nonzero()[:, 0].tolist() for group in range(plan.num_groups)]
        assert found == [sorted(group) for group in expected if group]
