"""Targets, protected tokens and sources: cells on any grid, assignments, the published code's choices."""

from __future__ import annotations

import pytest
import torch
from references import Golden

from geoaccel.layout import TokenLayout
from geoaccel.merging.partition import (
    Partition,
    assign,
    highest,
    lowest_of_cells,
    marked,
    num_cells,
    released_cells,
    released_lowest,
    released_match,
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


def random_partition(*, repeat: bool) -> tuple[Partition, torch.Tensor, torch.Tensor]:
    """Two rows of 40 tokens, 10 targets and 8 protected tokens, 4 of them targets as well."""
    order = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)).argsort(-1)
    target = torch.zeros(2, 40, dtype=torch.bool).scatter(-1, order[:, :10], True)
    protected = torch.zeros(2, 40, dtype=torch.bool).scatter(-1, order[:, 6:14], True)
    return Partition.from_masks(target, protected, repeat=repeat), target, protected


def test_parts_are_a_partition() -> None:
    partition, target, protected = random_partition(repeat=False)
    parts = torch.cat([partition.targets, partition.protected, partition.sources], dim=-1)
    assert torch.equal(parts.sort(-1).values, torch.arange(40).expand(2, -1))
    assert torch.equal(partition.targets, marked(target))
    assert torch.equal(partition.protected, marked(protected & ~target))
    assert partition.repeated.shape == (2, 0)


@pytest.mark.parametrize("most", [0, 1, 9, 26, 100])
def test_sources_go_to_the_most_similar_target_and_the_least_similar_stay_alone(most: int) -> None:
    partition, _, _ = random_partition(repeat=False)
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))
    assignment = assign(partition, x, most)
    merged = min(most, 26)
    assert assignment.length == 40 - merged
    for row in range(2):
        sources, targets = partition.sources[row], partition.targets[row]
        similarity = torch.cosine_similarity(x[row, sources][:, None], x[row, targets][None], dim=-1)
        best, where = similarity.max(-1)
        goes = best.argsort(descending=True)[:merged].tolist()
        expected = [[token] for token in range(40)]
        for index in goes:
            expected[targets[where[index]]].append(int(sources[index]))
            expected[sources[index]] = []
        groups = assignment.plan.group_of[row]
        found = [(groups == group).nonzero()[:, 0].tolist() for group in range(assignment.length)]
        assert found == [sorted(group) for group in expected if group]


def test_repeated_tokens_absorb_and_stand_alone_too() -> None:
    partition, target, protected = random_partition(repeat=True)
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))
    once, again = assign(random_partition(repeat=False)[0], x, 40), assign(partition, x, 40)
    assert torch.equal(partition.repeated, marked(target & protected))
    assert again.length == once.length + 4
    merged, back = again.merge(x), again.unmerge(again.merge(x))
    assert torch.equal(merged[:, :-4].sort(1).values, once.merge(x).sort(1).values)  # up to the order of targets
    both = target & protected
    assert torch.equal(back[both], x[both])
    assert torch.allclose(back[~both], once.unmerge(once.merge(x))[~both], atol=1e-6)


# ------------------------------------------------------------------------------------ the published code's choices


def released_by_hand(choice: torch.Tensor, grid: tuple[int, int]) -> set[int]:
    """Indices of patches: cells of an even grid, written row after row whatever the width."""
    rows, columns = grid[0] // 2, grid[1] // 2
    found = set()
    for i in range(rows):
        for j in range(columns):
            k = int(choice[i, j])
            found.add((2 * i + k // 2) * 2 * columns + 2 * j + k % 2)
    return found


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (7, 4), (28, 37)])
def test_published_cells_are_skewed_where_the_width_is_odd(grid: tuple[int, int]) -> None:
    choice = torch.randint(4, (grid[0] // 2, grid[1] // 2), generator=torch.Generator().manual_seed(0))
    mask = released_cells(choice, grid)
    assert set(mask.nonzero()[:, 0].tolist()) == released_by_hand(choice, grid)
    cells = cell_of(grid).flatten()[mask].unique()
    full = (grid[0] // 2) * (grid[1] // 2)
    assert (len(cells) == full) == (grid[1] % 2 == 0)


def test_published_choice_is_the_lowest_of_four_in_a_row() -> None:
    score = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    runs = score[:4, :6].flatten().view(2, 3, 4)
    assert torch.equal(released_lowest(score), runs.argmin(-1))


@pytest.mark.parametrize(("parity", "grid"), [("even", (28, 36)), ("odd", (28, 37))])
def test_litevggt_merges_random_tokens_like_the_published_code(parity: str, grid: tuple[int, int]) -> None:
    golden = Golden("merging_released")
    layout = TokenLayout(1, 4, grid, 5)
    score, x = golden[f"{parity}.info_map"][None, :, 0], golden[f"{parity}.x"]
    targets = scene_mask(released_cells(released_lowest(score), grid), layout, special=True, anchor=True)
    top = score.flatten(-2).topk(grid[0] * grid[1] // 10, dim=-1).indices
    protected = torch.zeros(1, 4, grid[0] * grid[1], dtype=torch.bool).scatter(-1, top, True)
    partition = Partition.from_masks(targets, scene_mask(protected, layout, special=False), repeat=True)
    assignment = assign(partition, x, int(0.9 * x.shape[1]), match=released_match)
    assert assignment.length == golden.config[f"{parity}.litevggt.merged_length"]
    restored = assignment.unmerge(assignment.merge(x))
    assert torch.allclose(restored, golden[f"{parity}.litevggt.restored"], atol=1e-5)
