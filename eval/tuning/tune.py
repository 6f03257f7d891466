"""From a budget to a plan.

1. Each choice of each layer (and, where memory is limited, of each block's linears) alone, on half of the photographs.
2. A knapsack over errors that add up and costs from the cost model.
3. The choice as a whole on the same photographs: errors of layers do not quite add up, and the budget that the knapsack
   gets is corrected by how far off the sum was.
4. The plan on the photographs that had no part in choosing; while it does not hold on both halves, a slower choice.
   Where corrections find none that holds, choices are halved until one does.
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
"""How often the budget of the knapsack is corrected, on the photographs to choose by and again on both halves."""

WORTH = 0.01
"""Share of a forward that halving has to be able to gain; with less it ends. A front of `knapsack.LIMIT` choices takes
at most 12 halvings."""

OTHER_BUDGETS = (0.5, 2.0, 4.0)
"""By what a budget is multiplied to tell what another one would gain."""

CHOOSING, UNSEEN = BOTH = "choosing", "unseen"
NAMES, METHODS = tuple(CHOICES), tuple(CHOICES.values())


@dataclass(frozen=True)
class Round:
    """One choice as a whole.

    Attributes:
        clips: On which it ran, ``choosing`` or ``unseen``.
        chosen: Choice of each layer, by name.
        predicted: Share of the budget that the sum says.
        measured: Share of the budget that it took.
        speedup: Predicted.
    """

    clips: str
    chosen: tuple[str, ...]
    predicted: float
    measured: float
    speedup: float


@dataclass
class Found:
    """What tuning found.

    Attributes:
        change: The plan.
        chosen: Choice of each layer, by name.
        alone: Errors of each choice alone, layer by layer.
        costs: Of every choice in every layer.
        predicted, choosing, unseen: Errors: the sum, and measured as a whole on either half.
        speedup: Predicted.
        small: What was chosen for the linears.
        others: Predicted speedup at other budgets, by what this one's limits are multiplied with; none for a plan that
            limits no error.
        rounds: The choices that were tried as a whole, in order.
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
    """Chooses for one network.

    Args:
        trials: Measures on the clips ``choosing`` and ``unseen``.
        budget: What was asked for.
        frames: Photographs that costs are predicted for.
        size: (H, W) of them.
        track: Goes over the trials.
        report: Called with a line of text now and then.

    Raises:
        ValueError: If the budget cannot be met whatever layers bear.
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
            ValueError: If no choice holds; the line says the nearest that does.
        """
        small = smallest(self.trials, self.budget, self.frames, self.size, self.track, CHOOSING)
        alone = self._alone()
        picks = self._front(alone, small)
        pick = self._settled(self._corrected(picks, small), picks, small)
        if self.budget.wants_speed and all(METHODS[i] is None for i in pick.chosen):
            self.report(f"nothing that is faster holds {self.budget.words()}: the plan leaves every layer dense")
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
        """Errors of each choice in each layer; of dense attention none."""
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
        """The choices worth thinking of; errors are shares of the budget, costs what a forward takes."""
        groups = [
            [Option(self.budget.share(errors), work[name]) for name, errors in row.items()]
            for row, work in zip(alone, self.costs.layers, strict=True)
        ]
        groups.append([Option(self.budget.share(small.errors), self.costs.rest)])
        return [Pick(pick.error, pick.cost, pick.chosen[:-1]) for pick in front(groups)]

    def _corrected(self, picks: list[Pick], small: Small) -> Pick:
        """The choice that is expected to take up the budget, by what choices take up as a whole."""
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
        # Where errors are no multiple of their sum, corrections may all end on one side.
        if held is picks[0] and missed < len(picks):
            return self._halved(picks, missed, small, (CHOOSING,))
        return held

    def _halved(self, picks: Sequence[Pick], missed: int, small: Small, clips: Sequence[str]) -> Pick:
        """The fastest choice found that holds among those slower than one that does not, by halving; else the slowest.

        Args:
            picks: All of them.
            missed: Index of the slowest that was found not to hold.
            small: What was chosen for the linears.
            clips: Where it has to hold.
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
        assert pick is not None, "looked at before anything was measured"
        return pick

    def _settled(self, pick: Pick, picks: list[Pick], small: Small) -> Pick:
        """The choice, or a slower one, that holds on the photographs to choose by and on the others.

        Raises:
            ValueError: If none does that is fast enough.
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
        """A choice that holds on both halves where this one takes up such a share; None where there is none."""
        missed = picks.index(pick)
        for _ in range(CORRECTIONS):
            if missed == 0:
                return None
            # At least a step back, and as far as the sum says where it is far off.
            pick = cheapest(picks, min(pick.error / share, picks[missed - 1].error)) or picks[0]
            share = self._share(pick, small)
            if share <= 1:
                break
            missed = picks.index(pick)
        if share > 1 or pick is picks[0]:
            pick = self._halved(picks, missed, small, BOTH)
        return pick if self._share(pick, small) <= 1 else None

    def _others(self, picks: Sequence[Pick], pick: Pick, small: Small) -> dict[float, float]:
        """What other budgets are expected to gain, if errors of layers add up there as they do in the plan."""
        share = self.budget.share(self.trials.errors(self._change(pick, small), CHOOSING))
        if not self.budget.limits_errors or not self.budget.wants_speed or share == 0:
            return {}
        return {
            factor: self._speedup(cheapest(picks, factor * pick.error / share) or picks[0]) for factor in OTHER_BUDGETS
        }

    def _nearest(self, fast: Pick, slow: Pick | None, small: Small) -> str:
        """One line on what holds instead of a budget that nothing meets."""
        # Below 1.005x there is no --speedup to give, and what predicts NaN is nothing to ask for.
        near = [slow] if slow is not None and self._speedup(slow) > 1.005 else []
        words = [self._reached(pick, small) for pick in (*near, fast) if self._share(pick, small) < math.inf]
        advice = f"nearest: {' or '.join(words)}; give {'one of these' if len(words) > 1 else 'that'}"
        if not words:
            advice = "the model predicts NaN; give less --speedup or more --max-memory"
        asked = f"no plan holds {self.budget.words()} on both halves of the photographs"
        return f"{asked}; {advice}, what was measured is kept"

    def _reached(self, pick: Pick, small: Small) -> str:
        """What a choice reaches on both halves, rounded so that it holds that as a budget, too."""
        found = [self.trials.errors(self._change(pick, small), clips) for clips in BOTH]
        errors = {name: three_digits(max(own[name] for own in found), up=True) for name in self.budget.limits}
        speed = "" if self.budget.speedup is None else f"{three_digits(self._speedup(pick), up=False):.3g}x with "
        return speed + in_words(errors)

    def _share(self, pick: Pick, small: Small, clips: Sequence[str] = BOTH) -> float:
        """The largest share of the budget that a choice takes up on any of these clips."""
        return max(self._as_a_whole(pick, small, name) for name in clips)

    def _as_a_whole(self, pick: Pick, small: Small, clips: str) -> float:
        """The share of the budget that a choice takes up."""
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
        """Refuse a speedup that no choice of layers reaches, before anything is measured."""
        most = self.costs.dense / self.costs.least
        if self.budget.speedup is not None and self.budget.speedup > most:
            raise UserError(
                f"--speedup {self.budget.speedup:g}: with {self.frames} photographs of {self.size[0]} x {self.size[1]} "
                f"pixels no choice of layers is faster than {most:.3g}x; give less, or more photographs"
            )
