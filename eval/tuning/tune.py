"""From a budget to a plan.

1. Measure each choice of each layer (and, with limited memory, of each block's linears) alone, on half of the
   photographs.
2. Solve a knapsack with additive errors and costs from the cost model.
3. Measure the whole choice on the same photographs: errors of layers are not exactly additive, and the knapsack's
   budget is corrected by the deviation.
4. Measure the plan on the held-out photographs; while it does not meet the budget on both halves, try a slower choice.
   If corrections find none that does, bisect over the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from geoaccel.errors import UserError
from geoaccel.eval.tuning.budget import Budget, in_words, three_digits
from geoaccel.eval.tuning.choices import CHOICES, Costs, costs
from geoaccel.eval.tuning.knapsack import Option, Pick, cheapest, closest, front
from geoaccel.eval.tuning.memory import Small, smallest
from geoaccel.eval.tuning.trials import Change, Errors, Trials
from geoaccel.merging.method import AttentionMerging
from geoaccel.quantization.calibrate.search import Track, silently

CORRECTIONS = 4
"""Maximum corrections of the knapsack's budget, on the first half of the photographs and again on both halves."""

WORTH = 0.01
"""Bisection ends when it can gain less than this fraction of a forward. A front of `knapsack.LIMIT` choices takes at
most 12 bisection steps."""

OTHER_BUDGETS = (0.5, 2.0, 4.0)
"""Factors of the budget for which the expected gain is reported."""

CHOOSING, UNSEEN = BOTH = "choosing", "unseen"
NAMES, METHODS = tuple(CHOICES), tuple(CHOICES.values())


@dataclass(frozen=True)
class Round:
    """One choice for all layers together.

    Attributes:
        clips: Clips on which it ran, ``choosing`` or ``unseen``.
        chosen: Choice of each layer, by name.
        predicted: Fraction of the budget predicted by the sum.
        measured: Fraction of the budget measured.
        speedup: Predicted speedup.
    """

    clips: str
    chosen: tuple[str, ...]
    predicted: float
    measured: float
    speedup: float


@dataclass
class Found:
    """Result of tuning.

    Attributes:
        change: The plan.
        chosen: Choice of each layer, by name.
        alone: Errors of each choice alone, layer by layer.
        costs: Costs of every choice in every layer.
        predicted, choosing, unseen: Errors: the predicted sum, and those of the plan measured on either half.
        speedup: Predicted speedup.
        small: Choice for the linears.
        others: Predicted speedup at other budgets, by the factor on this one's limits; none for a plan without limits
            on errors.
        rounds: The choices measured as a whole, in order.
    """

    change: Change
    chosen: tuple[str, ...]
    alone: list[dict[str, Errors]]
    costs: Costs
    predicted: Errors
    choosing: Errors
    unseen: Errors
    speedup: float
    small: Small
    others: dict[float, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)


class Tuner:
    """Chooses a plan for one network.

    Args:
        trials: Measures on the clips ``choosing`` and ``unseen``.
        budget: The requested budget.
        frames: Number of photographs for which costs are predicted.
        size: (H, W) of them.
        track: Iterates over the trials, with progress.
        report: Called with lines of text on progress.

    Raises:
        ValueError: If the budget cannot be met by any choice.
    """

    def __init__(
        self,
        trials: Trials,
        budget: Budget,
        frames: int,
        size: tuple[int, int],
        *,
        track: Track[Any] = silently,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.trials, self.budget, self.frames, self.size = trials, budget, frames, size
        self.track, self.report = track, report
        network: Any = trials.model
        self.depth = len(network.backbone.sites(trials.model)["global"])
        self.costs = costs(trials.model, frames, size)
        self.rounds: list[Round] = []
        self._check_speed()

    def run(self) -> Found:
        """Measure, choose, check.

        Raises:
            ValueError: If no choice meets the budget; the message has the nearest budget that can be met.
        """
        small = smallest(self.trials, self.budget, self.frames, self.size, self.track, CHOOSING)
        alone = self._alone()
        picks = self._front(alone, small)
        pick = self._settled(self._corrected(picks, small), picks, small)
        if self.budget.wants_speed and all(METHODS[i] is None for i in pick.chosen):
            self.report(f"no faster choice meets {self.budget.words()}: the plan leaves every layer dense")
        change = self._change(pick, small)
        predicted = {
            name: small.errors[name] + sum(row[NAMES[i]][name] for row, i in zip(alone, pick.chosen, strict=True))
            for name in small.errors
        }
        return Found(
            change,
            tuple(NAMES[i] for i in pick.chosen),
            alone,
            self.costs,
            predicted,
            self.trials.errors(change, CHOOSING),
            self.trials.errors(change, UNSEEN),
            self._speedup(pick),
            small,
            self._others(picks, pick, small),
            self.rounds,
        )

    def _alone(self) -> list[dict[str, Errors]]:
        """Errors of each choice in each layer; zero for dense attention."""
        found: list[dict[str, Errors]] = [{} for _ in range(self.depth)]
        names = list(CHOICES) if self.budget.wants_speed else list(CHOICES)[:1]
        steps = [(layer, name) for layer in range(self.depth) for name in names]
        for layer, name in self.track(steps, "layers", len(steps)):
            method = CHOICES[name]
            if method is None:
                found[layer][name] = dict.fromkeys(("pose_deg", "depth_rel", "points"), 0.0)
            else:
                change = Change(tuple(self._one(layer, method)))
                found[layer][name] = self.trials.errors(change, CHOOSING)
        return found

    def _front(self, alone: Sequence[dict[str, Errors]], small: Small) -> list[Pick]:
        """The Pareto-optimal choices; errors are fractions of the budget, costs are times of a forward."""
        groups = [
            [Option(self.budget.share(errors), work[name]) for name, errors in row.items()]
            for row, work in zip(alone, self.costs.layers, strict=True)
        ]
        groups.append([Option(self.budget.share(small.errors), self.costs.rest)])
        return [Pick(pick.error, pick.cost, pick.chosen[:-1]) for pick in front(groups)]

    def _corrected(self, picks: list[Pick], small: Small) -> Pick:
        """The choice expected to use up the budget, judged by measurements of whole choices."""
        if self.budget.speedup is not None or not self.budget.limits_errors:
            return self._for_speed(picks)
        allowed, held, missed = 1.0, picks[0], len(picks)
        tried: set[int] = set()
        for _ in range(CORRECTIONS):
            pick = cheapest(picks, allowed) or picks[0]
            place = picks.index(pick)
            if place in tried:
                break
            tried.add(place)
            share = self._as_a_whole(pick, small, CHOOSING)
            if share > 1:
                missed = min(missed, place)
            elif pick.cost <= held.cost:
                held = pick
            if place == 0 and share > 1:
                return pick
            allowed = pick.error / share if share > 0 else picks[-1].error
        # If errors are not proportional to their sum, corrections may all end on one side.
        if held is picks[0] and missed < len(picks):
            return self._halved(picks, missed, small, (CHOOSING,))
        return held

    def _halved(self, picks: Sequence[Pick], missed: int, small: Small, clips: Sequence[str]) -> Pick:
        """The fastest choice found by bisection that meets the budget, slower than one that does not; else the slowest.

        Args:
            picks: All choices.
            missed: Index of the slowest choice known not to meet the budget.
            small: Choice for the linears.
            clips: Clips on which it must meet the budget.
        """
        holds = 0
        while missed - holds > 1 and picks[holds].cost - picks[missed].cost > WORTH * self.costs.dense:
            middle = (holds + missed) // 2
            if self._share(picks[middle], small, clips) <= 1:
                holds = middle
            else:
                missed = middle
        return picks[holds]

    def _for_speed(self, picks: Sequence[Pick]) -> Pick:
        if self.budget.speedup is None:
            return picks[0]
        pick = closest(picks, self.costs.dense / self.budget.speedup)
        assert pick is not None, "checked before anything was measured"
        return pick

    def _settled(self, pick: Pick, picks: list[Pick], small: Small) -> Pick:
        """The choice, or a slower one, that meets the budget on both halves of the photographs.

        Raises:
            ValueError: If none that is fast enough does.
        """
        if not self.budget.limits_errors:
            self._as_a_whole(pick, small, UNSEEN)
            return pick
        share = self._share(pick, small)
        if share <= 1:
            return pick
        slow = self._slower(pick, share, picks, small)
        if slow is None or self.budget.speedup is not None:
            raise UserError(self._nearest(pick, slow, small))
        return slow

    def _slower(self, pick: Pick, share: float, picks: list[Pick], small: Small) -> Pick | None:
        """A choice expected to meet the budget on both halves, given this one's use of it; None if there is none."""
        missed = picks.index(pick)
        for _ in range(CORRECTIONS):
            if missed == 0:
                return None
            # At least one step back, or as far as the sum predicts if the deviation is large.
            pick = cheapest(picks, min(pick.error / share, picks[missed - 1].error)) or picks[0]
            share = self._share(pick, small)
            if share <= 1:
                break
            missed = picks.index(pick)
        if share > 1 or pick is picks[0]:
            pick = self._halved(picks, missed, small, BOTH)
        return pick if self._share(pick, small) <= 1 else None

    def _others(self, picks: Sequence[Pick], pick: Pick, small: Small) -> dict[float, float]:
        """Expected gains of other budgets, assuming that errors of layers add up as in the plan."""
        share = self.budget.share(self.trials.errors(self._change(pick, small), CHOOSING))
        if not self.budget.limits_errors or not self.budget.wants_speed or share == 0:
            return {}
        return {
            factor: self._speedup(cheapest(picks, factor * pick.error / share) or picks[0]) for factor in OTHER_BUDGETS
        }

    def _nearest(self, fast: Pick, slow: Pick | None, small: Small) -> str:
        """One line with the nearest budgets that can be met, if this one cannot."""
        # Below 1.005x there is no --speedup to suggest, and choices that predict NaN are not suggested.
        near = [slow] if slow is not None and self._speedup(slow) > 1.005 else []
        words = [self._reached(pick, small) for pick in (*near, fast) if self._share(pick, small) < math.inf]
        advice = f"nearest: {' or '.join(words)}; give {'one of these' if len(words) > 1 else 'that'}"
        if not words:
            advice = "the model predicts NaN; give less --speedup or more --max-memory"
        asked = f"no plan meets {self.budget.words()} on both halves of the photographs"
        return f"{asked}; {advice}, measurements are kept"

    def _reached(self, pick: Pick, small: Small) -> str:
        """Errors of a choice on both halves, rounded so that it also meets them as a budget."""
        found = [self.trials.errors(self._change(pick, small), clips) for clips in BOTH]
        errors = {name: three_digits(max(own[name] for own in found), up=True) for name in self.budget.limits}
        speed = "" if self.budget.speedup is None else f"{three_digits(self._speedup(pick), up=False):.3g}x with "
        return speed + in_words(errors)

    def _share(self, pick: Pick, small: Small, clips: Sequence[str] = BOTH) -> float:
        """The largest fraction of the budget that a choice uses on any of these clips."""
        return max(self._as_a_whole(pick, small, name) for name in clips)

    def _as_a_whole(self, pick: Pick, small: Small, clips: str) -> float:
        """The fraction of the budget that a choice uses."""
        share = self.budget.share(self.trials.errors(self._change(pick, small), clips))
        chosen = tuple(NAMES[i] for i in pick.chosen)
        found = Round(clips, chosen, pick.error, share, self._speedup(pick))
        if found not in self.rounds:
            self.rounds.append(found)
            self.report(f"{clips}: {self._speedup(pick):.2f}x, {share:.0%} of the budget, {pick.error:.0%} predicted")
        return share

    def _change(self, pick: Pick, small: Small) -> Change:
        return Change(tuple(METHODS[i] for i in pick.chosen), small.quantization)

    def _speedup(self, pick: Pick) -> float:
        return self.costs.dense / pick.cost

    def _one(self, layer: int, method: AttentionMerging | None) -> list[AttentionMerging | None]:
        return [method if i == layer else None for i in range(self.depth)]

    def _check_speed(self) -> None:
        """Reject a speedup that no choice of layers reaches, before anything is measured."""
        most = self.costs.dense / self.costs.least
        if self.budget.speedup is not None and self.budget.speedup > most:
            raise UserError(
                f"--speedup {self.budget.speedup:g}: with {self.frames} photographs of {self.size[0]} x {self.size[1]} "
                f"pixels no choice of layers is faster than {most:.3g}x; give less, or more photographs"
            )
