"""The knapsack against every combination."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from geoaccel.eval.tuning.knapsack import Option, cheapest, closest, front


def drawn(seed: int) -> list[list[Option]]:
    """Groups of options, some of them equal, beaten by another, or out of the question."""
    draw = random.Random(seed)
    groups = []
    for _ in range(draw.randint(1, 6)):
        options = [Option(0.0, draw.randint(5, 9))]
        for _ in range(draw.randint(0, 4)):
            options.append(
                Option(draw.choice([0.0, 0.1, draw.random(), math.inf]), draw.choice([1, 2.5, draw.random()]))
            )
        groups.append(options)
    return groups


def every(groups: list[list[Option]]) -> list[tuple[float, float]]:
    """Error and cost of every combination."""
    return [
        (sum(option.error for option in chosen), sum(option.cost for option in chosen))
        for chosen in itertools.product(*groups)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_better_than_the_picks(seed: int) -> None:
    groups = drawn(seed)
    picks, combinations = front(groups), every(groups)
    for pick in picks:
        chosen = [group[index] for group, index in zip(groups, pick.chosen, strict=True)]
        assert pick.error == pytest.approx(sum(option.error for option in chosen))
        assert pick.cost == pytest.approx(sum(option.cost for option in chosen))
    for error in (0.0, 0.05, 0.3, 1.0, 2.0, 10.0):
        best = min(cost for e, cost in combinations if e <= error + 1e-12)
        found = cheapest(picks, error + 1e-12)
        assert found is not None
        assert found.cost == pytest.approx(best)
    for cost in (3.0, 8.0, 20.0, 60.0):
        fitting = [e for e, c in combinations if c <= cost and math.isfinite(e)]
        near = closest(picks, cost)
        assert (near is None) == (not fitting)
        if near is not None:
            assert near.error == pytest.approx(min(fitting))


def test_a_long_front_is_thinned_and_stays_true() -> None:
    groups = [[Option(0.0, 1.0), Option(2.0**-i, 1 - 2.0**-i)] for i in range(10)]
    whole, thin = front(groups), front(groups, limit=50)
    assert len(whole) == 1024
    assert len(thin) == 50
    assert (thin[0], thin[-1]) == (whole[0], whole[-1])
    assert {(pick.error, pick.cost) for pick in thin} <= {(pick.error, pick.cost) for pick in whole}


def test_of_equal_picks_the_earlier_options_are_kept() -> None:
    groups = [[Option(0.0, 2.0), Option(0.5, 1.0), Option(0.5, 1.0)]] * 2
    assert [pick.chosen for pick in front(groups)] == [(0, 0), (0, 1), (1, 1)]


def test_what_has_no_finite_error_is_never_picked() -> None:
    assert [pick.chosen for pick in front([[Option(0.0, 2.0), Option(math.inf, 0.0)]])] == [(0,)]
