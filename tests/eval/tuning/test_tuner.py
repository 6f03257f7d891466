"""How a plan is chosen, with errors that are given and not measured: within the budget, corrected, backed off."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from references import Golden

from geoaccel.errors import UserError
from geoaccel.eval.tuning.budget import Budget
from geoaccel.eval.tuning.choices import CHOICES
from geoaccel.eval.tuning.report import table
from geoaccel.eval.tuning.trials import NAMES, Change, Errors, Trials
from geoaccel.eval.tuning.tune import CHOOSING, CORRECTIONS, UNSEEN, WORTH, Found, Tuner

SIZE, FRAMES = (224, 224), 64
METHODS = {method: name for name, method in CHOICES.items()}
ERROR = {name: 0.02 * 1.7**rank for rank, name in enumerate(CHOICES)} | {"dense": 0.0}


def alone(layer: int, name: str) -> float:
    """The error of a choice: later layers bear less."""
    return ERROR[name] * (1 + layer)


class Given(Trials):
    """Errors of a change by a formula: what layers do alone adds up, times a factor for each set of photographs."""

    factor: Callable[[Change, str], float]

    def errors(self, change: Change, clips: str) -> Errors:
        self.measured += 1
        total = sum(alone(layer, METHODS[method]) for layer, method in enumerate(change.layers))
        single = sum(method is not None for method in change.layers) < 2
        pose = total if single and clips == CHOOSING else total * type(self).factor(change, clips)
        return {"pose_deg": pose, "depth_rel": pose / 100, "points": 0.0}


@pytest.fixture(scope="module")
def network() -> Any:
    """A tiny network; nothing of it is run."""
    return Golden("vggt_tiny", "vggt").network()


def tuner(network: Any, budget: Budget, factor: Callable[[Change, str], float] = lambda change, clips: 1.0) -> Tuner:
    kind = type("WithFactor", (Given,), {"factor": staticmethod(factor)})
    return Tuner(kind(network, {}), budget, FRAMES, SIZE)


def best(run: Tuner, most: float) -> float:
    """The least cost of all combinations within an error."""
    combinations = itertools.product(CHOICES, repeat=run.depth)
    return min(
        run.costs.forward(names)
        for names in combinations
        if sum(alone(layer, name) for layer, name in enumerate(names)) <= most + 1e-12
    )


def cost(run: Tuner, found: Found) -> float:
    return run.costs.forward(found.chosen)


@pytest.mark.parametrize("most", [0.03, 0.2, 1.0, 5.0])
def test_the_fastest_plan_within_the_budget(network: Any, most: float) -> None:
    run = tuner(network, Budget(pose_deg=most))
    found = run.run()
    assert cost(run, found) == pytest.approx(best(run, most))
    assert found.unseen["pose_deg"] <= most
    assert found.predicted["pose_deg"] == pytest.approx(found.unseen["pose_deg"])
    assert found.speedup == pytest.approx(run.costs.dense / best(run, most))
    assert tuner(network, Budget(pose_deg=most)).run() == found


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_other_budgets_are_told_as_they_come_out(network: Any, factor: float) -> None:
    def share(change: Change, clips: str) -> float:
        return factor

    found = tuner(network, Budget(pose_deg=0.2), share).run()
    assert list(found.others) == [0.5, 2.0, 4.0]
    # A layer alone is what it is: where little is allowed there is nothing that adds up to less.
    for times, speedup in [(times, speedup) for times, speedup in found.others.items() if factor == 1 or times > 1]:
        own = tuner(network, Budget(pose_deg=0.2 * times), share).run()
        assert own.speedup == pytest.approx(speedup, rel=0.05)
    assert "0.4 deg" in table(found, Budget(pose_deg=0.2), timing_of(found))
    assert tuner(network, Budget(speedup=1.2)).run().others == {}


def test_what_takes_up_less_than_its_parts_gets_more(network: Any) -> None:
    run = tuner(network, Budget(pose_deg=0.2), lambda change, clips: 0.5)
    found = run.run()
    assert cost(run, found) < best(run, 0.2)
    assert cost(run, found) == pytest.approx(best(run, 0.4))
    assert found.choosing["pose_deg"] <= 0.2


def test_what_takes_up_more_than_its_parts_gets_less(network: Any) -> None:
    run = tuner(network, Budget(pose_deg=0.2), lambda change, clips: 2.0)
    found = run.run()
    assert found.choosing["pose_deg"] <= 0.2
    assert cost(run, found) == pytest.approx(best(run, 0.1))


def test_a_plan_that_does_not_hold_on_other_photographs_backs_off(network: Any) -> None:
    run = tuner(network, Budget(pose_deg=0.2), lambda change, clips: 3.0 if clips == UNSEEN else 1.0)
    found = run.run()
    assert found.unseen["pose_deg"] <= 0.2
    assert cost(run, found) > best(run, 0.2)
    unseen = [one for one in run.rounds if one.clips == UNSEEN]
    assert [one.measured > 1 for one in unseen] == [True] * (len(unseen) - 1) + [False]


def test_where_nothing_holds_everything_stays_dense(network: Any) -> None:
    found = tuner(network, Budget(pose_deg=0.2), lambda change, clips: 1e6).run()
    assert set(found.chosen) == {"dense"}
    assert found.speedup == 1


def test_a_speedup_is_reached_with_the_least_error(network: Any) -> None:
    run = tuner(network, Budget(speedup=1.2))
    found = run.run()
    assert found.speedup >= 1.2
    enough = [
        sum(alone(layer, name) for layer, name in enumerate(names))
        for names in itertools.product(CHOICES, repeat=run.depth)
        if run.costs.forward(names) <= run.costs.dense / 1.2
    ]
    assert found.predicted["pose_deg"] == pytest.approx(min(enough))


def test_a_speedup_beyond_all_choices_is_refused_before_anything_is_measured(network: Any) -> None:
    with pytest.raises(UserError, match=r"--speedup 1000: with 64 photographs .* no choice of layers is faster than"):
        tuner(network, Budget(speedup=1000.0))


def test_a_plan_for_a_speedup_holds_on_the_photographs_it_was_chosen_by(network: Any) -> None:
    """The other half may be the easier one."""
    run = tuner(network, Budget(pose_deg=0.5, speedup=1.2), lambda change, clips: 30.0 if clips == CHOOSING else 0.1)
    with pytest.raises(UserError, match=r"no plan meets 0.5 deg, 1.2x on both halves of the photographs; nearest: "):
        run.run()
    assert {one.clips for one in run.rounds} == {CHOOSING, UNSEEN}


def test_linears_that_take_up_more_than_the_budget_are_refused(network: Any) -> None:
    """Where only the photographs to choose by show it."""

    class Offset(Given):
        def errors(self, change: Change, clips: str) -> Errors:
            found = super().errors(change, clips)
            return {**found, "pose_deg": found["pose_deg"] + (0.8123 if clips == CHOOSING else 0.1)}

    kind = type("WithOffset", (Offset,), {"factor": staticmethod(lambda change, clips: 1.0)})
    budget = Budget(pose_deg=0.5, memory_bytes=10**12)
    with pytest.raises(UserError, match=r"nearest: 0.813 deg; give that") as caught:  # 0.812 would be refused again
        Tuner(kind(network, {}), budget, FRAMES, SIZE).run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("misses", [CHOOSING, UNSEEN])
def test_halving_finds_what_corrections_miss(network: Any, misses: str) -> None:
    """Together errors saturate: every correction lands a little above the budget."""
    lines: list[str] = []

    class Saturated(Given):
        def errors(self, change: Change, clips: str) -> Errors:
            total = sum(alone(layer, METHODS[method]) for layer, method in enumerate(change.layers))
            together = clips == misses and sum(method is not None for method in change.layers) > 1
            return {"pose_deg": 0.49 + 0.1 * total if together else total, "depth_rel": 0.0, "points": 0.0}

    run = Tuner(Saturated(network, {}), Budget(pose_deg=0.5), FRAMES, SIZE, report=lines.append)
    found = run.run()
    assert cost(run, found) <= best(run, 0.1) + WORTH * run.costs.dense
    assert max(found.choosing["pose_deg"], found.unseen["pose_deg"]) <= 0.5
    assert len(run.rounds) <= 2 * (CORRECTIONS + 12)
    assert len(lines) == len(run.rounds)


def test_a_plan_of_nothing_says_so(network: Any) -> None:
    lines: list[str] = []
    run = tuner(network, Budget(pose_deg=0.001))
    run.report = lines.append
    assert set(run.run().chosen) == {"dense"}
    assert lines[-1] == "no faster choice meets 0.001 deg: the plan leaves every layer dense"


def test_what_predicts_nan_is_not_advised(network: Any) -> None:
    run = tuner(network, Budget(pose_deg=0.5, speedup=1.2), lambda change, clips: math.inf)
    with pytest.raises(UserError, match=r"photographs; the model predicts NaN; give less --speedup"):
        run.run()


def test_what_is_advised_holds(network: Any) -> None:
    """The errors are rounded up, and the speedup down."""
    factor = 1.2345

    def share(change: Change, clips: str) -> float:
        return factor

    with pytest.raises(UserError, match="nearest: ") as caught:
        tuner(network, Budget(pose_deg=0.05, speedup=1.3), share).run()
    for words in str(caught.value).split("nearest: ")[1].split(";")[0].split(" or "):
        speed, error = re.findall(r"[\d.]+", words)
        tuner(network, Budget(pose_deg=float(error), speedup=float(speed)), share).run()


def test_a_budget_that_nothing_meets_says_the_nearest(network: Any) -> None:
    run = tuner(network, Budget(pose_deg=0.05, speedup=1.3))
    with pytest.raises(UserError, match=r"no plan meets 0.05 deg, 1.3x .* nearest: ") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    words = str(caught.value).split("nearest: ")[1]
    slow, fast = (float(part.split("x with")[0]) for part in words.split(";")[0].split(" or "))
    assert slow < 1.3 <= fast


def test_two_errors_are_kept_together(network: Any) -> None:
    tight, loose = (tuner(network, Budget(pose_deg=5.0, depth_rel=depth)).run() for depth in (0.002, 0.5))
    assert tight.unseen["depth_rel"] <= 0.002
    assert loose.speedup > tight.speedup


def test_memory_alone_leaves_attention_as_it_is(network: Any) -> None:
    run = tuner(network, Budget(memory_bytes=10**12))
    assert set(run.run().chosen) == {"dense"}
    assert set(NAMES) == {"pose_deg", "depth_rel", "points"}


def timing_of(found: Found) -> dict[str, Any]:
    timing: dict[str, Any] = {"dense_ms": 100.0, "plan_ms": 50.0, "speedup": 2.0, "spread_ms": 10.0}
    return timing | dict.fromkeys(("layers_dense_ms", "layers_plan_ms"), [1.0] * len(found.chosen))


def test_a_busy_machine_is_said(network: Any) -> None:
    found = tuner(network, Budget(speedup=1.2)).run()
    timing = timing_of(found)
    calm, busy = (table(found, Budget(speedup=1.2), {**timing, "spread_ms": spread}) for spread in (10.0, 60.0))
    assert "2.00x measured (100 to 50 ms, quartiles 10 ms apart)" in calm
    assert "the machine is busy" in busy
    assert [line.split()[0] for line in calm.splitlines()[1 : 1 + len(found.chosen)]] == [
        str(layer) for layer in range(len(found.chosen))
    ]
