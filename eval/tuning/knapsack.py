"""Multiple-choice knapsack: one option per group, optimal in the sums of errors and costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 4096
"""Maximum picks kept between groups; beyond it the front is thinned evenly."""


@dataclass(frozen=True)
class Option:
    """One option of a group.

    Attributes:
        error: Its error; infinite if it cannot be chosen.
        cost: Its cost.
    """

    error: float
    cost: float


@dataclass(frozen=True)
class Pick:
    """One option of each group.

    Attributes:
        error, cost: Sums.
        chosen: Index of the option of each group.
    """

    error: float
    cost: float
    chosen: tuple[int, ...] = ()


def front(groups: Sequence[Sequence[Option]], limit: int = LIMIT) -> list[Pick]:
    """The Pareto front of picks: errors ascending, costs descending.

    Exact up to ``limit`` picks; beyond, every pick is still valid, but a few are missing. Of equal picks the one with
    the earlier options is kept, so that the result is deterministic.
    """
    picks = [Pick(0.0, 0.0)]
    for options in groups:
        grown = [
            Pick(pick.error + option.error, pick.cost + option.cost, (*pick.chosen, index))
            for pick, (index, option) in itertools.product(picks, enumerate(options))
            if math.isfinite(option.error)
        ]
        picks = _thinned(_unbeaten(grown), limit)
    return picks


def cheapest(picks: Sequence[Pick], error: float) -> Pick | None:
    """The cheapest pick whose error is at most this; None if there is none."""
    return next((pick for pick in reversed(picks) if pick.error <= error), None)


def closest(picks: Sequence[Pick], cost: float) -> Pick | None:
    """The pick of least error whose cost is at most this; None if there is none."""
    return next((pick for pick in picks if pick.cost <= cost), None)


def _unbeaten(picks: list[Pick]) -> list[Pick]:
    kept: list[Pick] = []
    for pick in sorted(picks, key=lambda pick: (pick.error, pick.cost, pick.chosen)):
        if not kept or pick.cost < kept[-1].cost:
            kept.append(pick)
    return kept


def _thinned(picks: list[Pick], limit: int) -> list[Pick]:
    if len(picks) <= limit:
        return picks
    return [picks[i * (len(picks) - 1) // (limit - 1)] for i in range(limit)]
