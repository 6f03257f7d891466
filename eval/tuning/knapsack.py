"""One option for each group, so that errors and costs add up to the best there is: a knapsack with groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 4096
"""Picks that are kept from one group to the next; beyond it the front is thinned out evenly."""


@dataclass(frozen=True)
class Option:
    """What one group may do.

    Attributes:
        error: What it adds to the error; infinite where it cannot be chosen.
        cost: What it adds to the cost.
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
    """All picks that no other beats in both error and cost: errors ascending, costs descending.

    Exact while there are at most ``limit`` of them; beyond, every pick is still what it says, and a few are missing.
    Of equal ones that with the earlier options is kept, so that the result is always the same.
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
    """The cheapest pick whose error is at most this; None where there is none."""
    return next((pick for pick in reversed(picks) if pick.error <= error), None)


def closest(picks: Sequence[Pick], cost: float) -> Pick | None:
    """The pick of the least error whose cost is at most this; None where there is none."""
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
