"""The published code's choices: skewed cells, four patches in a row, tokens that appear twice."""

from __future__ import annotations

import pytest
import torch
from references import Golden
from test_partition import cell_of

from geoaccel.layout import TokenLayout
from geoaccel.merging.litevggt import LiteVGGT
from geoaccel.merging.partition import marked
from geoaccel.merging.released import (
    LITEVGGT_REFRESH,
    ReleasedPartition,
    bfloat16_match,
    litevggt_partition,
    lowest_of_runs,
    skewed_cells,
)


def test_repeated_tokens_absorb_and_stand_alone_too() -> None:
    """One row of 40 tokens, 10 targets and 8 protected tokens, 4 of them targets as well."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, 40, generator=generator).argsort(-1)
    target = torch.zeros(1, 40, dtype=torch.bool).scatter(-1, order[:, :10], True)
    protected = torch.zeros(1, 40, dtype=torch.bool).scatter(-1, order[:, 6:14], True)
    partition = ReleasedPartition.from_masks(target, protected)
    assert torch.equal(partition.repeated, marked(target & protected))
    x = torch.randn(1, 40, 6, generator=generator)
    plan = partition.assign(x, 40)
    assert plan.num_groups == 10 + 4 + 4
    merged = plan.merge(x)
    back, both = plan.unmerge(merged), target & protected
    assert torch.equal(back[both], x[both])
    # By hand: every source joins its most similar target, and targets absorb whether they are repeated or not.
    unit = (x[0] / x[0].norm(dim=-1, keepdim=True)).bfloat16()
    targets, sources = target[0].nonzero()[:, 0].tolist(), (~(target | protected))[0].nonzero()[:, 0].tolist()
    members = {t: [t] for t in targets}
    for token in sources:
        members[max(targets, key=lambda t: float(unit[token] @ unit[t]))].append(token)
    for t, tokens in members.items():
        for token in tokens:
            expected = x[0, t] if token == t and both[0, t] else x[0, tokens].mean(0)
            assert torch.allclose(back[0, token], expected, atol=1e-5)


def test_similarities_are_rounded() -> None:
    a, b = (torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (9, 5))
    score, best = bfloat16_match(a, b)
    assert torch.equal(score.bfloat16().float(), score)
    assert best.shape == (1, 9)


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
    mask = skewed_cells(choice, grid)
    assert set(mask.nonzero()[:, 0].tolist()) == released_by_hand(choice, grid)
    cells = cell_of(grid).flatten()[mask].unique()
    full = (grid[0] // 2) * (grid[1] // 2)
    assert (len(cells) == full) == (grid[1] % 2 == 0)


def test_published_choice_is_the_lowest_of_four_in_a_row() -> None:
    score = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    runs = score[:4, :6].flatten().view(2, 3, 4)
    assert torch.equal(lowest_of_runs(score), runs.argmin(-1))


@pytest.mark.parametrize(("parity", "grid"), [("even", (28, 36)), ("odd", (28, 37))])
def test_litevggt_merges_random_tokens_like_the_published_code(parity: str, grid: tuple[int, int]) -> None:
    golden = Golden("merging_released")
    layout = TokenLayout(1, 4, grid, 5)
    score, x = golden[f"{parity}.info_map"][None, :, 0], golden[f"{parity}.x"]
    plan = litevggt_partition(score, layout, 0.1).assign(x, int(0.9 * x.shape[1]))
    assert plan.num_groups == golden.config[f"{parity}.litevggt.merged_length"]
    assert torch.allclose(plan.unmerge(plan.merge(x)), golden[f"{parity}.litevggt.restored"], atol=1e-5)


def test_matching_is_renewed_at_the_layers_of_the_code() -> None:
    mixers = {flag: LiteVGGT(released_code=flag).mixers("sdpa", 24) for flag in (False, True)}
    renewed = {flag: tuple(i for i, mixer in enumerate(found) if mixer.refresh) for flag, found in mixers.items()}  # type: ignore[attr-defined]
    assert renewed == {False: (0, 6, 12, 18), True: LITEVGGT_REFRESH}
    assert LiteVGGT(released_code=True, refresh=(0, 12)).refresh_layers == (0, 12)
