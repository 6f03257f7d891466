"""Merge plans and matching: partitions, means, copies, ragged rows, ties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from geoaccel.plan import MergePlan
from geoaccel.similarity import best_match


def random_plan(rows: tuple[int, ...], tokens: int, groups: int, seed: int = 0) -> MergePlan:
    """A plan whose rows may differ in their number of groups."""
    generator = torch.Generator().manual_seed(seed)
    leaders = torch.rand(*rows, tokens, generator=generator).argsort(-1)[..., :groups].sort(-1).values
    choice = leaders.gather(-1, torch.randint(groups, (*rows, tokens), generator=generator))
    return MergePlan.from_owner(choice.scatter(-1, leaders, leaders))


def brute_force(plan: MergePlan, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted means, one group at a time, in float64."""
    out = torch.zeros(*x.shape[:-2], plan.num_groups, x.shape[-1], dtype=torch.float64)
    for row in range(x.flatten(0, -3).shape[0]):
        groups, tokens, w = (t.flatten(0, -2)[row] for t in (plan.group_of, x.flatten(-2), weight))
        tokens = tokens.view(*x.shape[-2:]).double()
        for group in groups.unique():
            members = groups == group
            mean = (tokens[members] * w[members, None].double()).sum(0) / w[members].double().sum()
            out.flatten(0, -3)[row, group] = mean
    return out


def test_group_means_equal_a_loop_over_groups() -> None:
    plan = random_plan((2, 3), 40, 7)
    x = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(2)) + 0.1
    ones = torch.ones_like(weight)
    assert torch.allclose(plan.merge(x).double(), brute_force(plan, x, ones), atol=1e-6)
    assert torch.allclose(plan.merge(x, weight).double(), brute_force(plan, x, weight), atol=1e-6)


def test_groups_are_a_partition_numbered_in_token_order() -> None:
    plan = MergePlan.from_owner(torch.tensor([[0, 3, 0, 3, 4], [2, 2, 2, 2, 2]]))
    assert plan.group_of.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert plan.counts.tolist() == [[2, 2, 1], [5, 0, 0]]
    assert plan.lengths.tolist() == [3, 1]
    assert plan.effective_ratio == pytest.approx(1 - 4 / 10)


def test_empty_groups_of_a_shorter_row_are_zero_and_cannot_be_seen_as_keys() -> None:
    plan = MergePlan.from_owner(torch.tensor([[0, 1, 2], [0, 0, 0]]))
    merged = plan.merge(torch.ones(2, 3, 2))
    assert merged[1].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert plan.log_counts[1, 1:].tolist() == [-torch.inf, -torch.inf]


def test_identity_changes_nothing() -> None:
    x = torch.randn(2, 6, 3)
    plan = MergePlan.identity((2,), 6)
    assert torch.equal(plan.merge(x), x)
    assert torch.equal(plan.unmerge(x), x)
    assert plan.effective_ratio == 0


def test_a_constant_survives_the_round_trip_and_merging_again_changes_nothing() -> None:
    plan = random_plan((2,), 50, 9)
    constant = torch.full((2, 50, 4), 0.3)
    assert torch.allclose(plan.unmerge(plan.merge(constant)), constant, rtol=1e-6)
    x = torch.randn(2, 50, 4)
    merged = plan.merge(x)
    assert torch.allclose(plan.merge(plan.unmerge(merged)), merged, atol=1e-6)


def test_narrow_types_are_summed_in_float32() -> None:
    plan = MergePlan.from_owner(torch.zeros(1, 4000, dtype=torch.long))
    x = torch.ones(1, 4000, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    assert plan.merge(x).item() == 1
    assert plan.merge(x, torch.full((1, 4000), 3.0)).item() == 1


def test_rows_do_not_see_each_other() -> None:
    plan = random_plan((3,), 30, 5)
    x = torch.randn(3, 30, 2)
    alone = MergePlan(plan.group_of[1:2], plan.num_groups).merge(x[1:2])
    assert torch.equal(plan.merge(x)[1:2], alone)


def test_weights_add_up() -> None:
    plan = MergePlan.from_owner(torch.tensor([[0, 0, 2, 2]]))
    assert plan.merge_weights(torch.tensor([[1.0, 2, 3, 4]])).tolist() == [[3, 7]]


def test_a_plan_can_be_copied_and_pickled() -> None:
    plan = random_plan((2,), 20, 4)
    x = torch.randn(2, 20, 3)
    before = plan.merge(x)
    for same in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(same.merge(x), before)


def test_a_wrong_length_is_one_clear_line() -> None:
    plan = random_plan((2,), 20, 4)
    with pytest.raises(ValueError, match=r"\[2, 20, C\], got \[2, 19, 3\]"):
        plan.merge(torch.zeros(2, 19, 3))
    with pytest.raises(ValueError, match=r"\[2, 4, C\], got \[2, 20, 3\]"):
        plan.unmerge(torch.zeros(2, 20, 3))


def test_matching_equals_the_full_matrix_however_it_is_cut() -> None:
    source, target = torch.randn(2, 3, 37, 8), torch.randn(2, 3, 11, 8)
    matrix = torch.nn.functional.cosine_similarity(source[..., :, None, :], target[..., None, :, :], dim=-1)
    for chunk in (1, 100, 1 << 20):
        score, index = best_match(source, target, chunk_elements=chunk)
        assert torch.equal(index, matrix.argmax(-1))
        assert torch.allclose(score, matrix.amax(-1), atol=1e-5)


def test_ties_go_to_the_lower_index_and_zeros_are_no_nan(this_processor: None) -> None:
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]])
    score, index = best_match(torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), target)
    assert index.tolist() == [[1, 0]]
    assert score.isfinite().all()


def test_matching_needs_something_to_choose_from() -> None:
    with pytest.raises(ValueError, match="needs a target in its own row"):
        best_match(torch.zeros(1, 3, 2), torch.zeros(1, 0, 2))


def test_autocast_does_not_narrow_the_comparison() -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(200, 64, generator=generator) for _ in range(2))
    expected = best_match(source, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = best_match(source, target)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
