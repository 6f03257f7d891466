"""Evaluations of scenes that a test makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geoaccel.eval.data.scene import EvalScene, Skipped
from geoaccel.eval.run.engines import Engine, local
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import Evaluation, predict, score
from geoaccel.eval.run.scoring import Protocol


class Given:
    """Scenes in place of those of a source."""

    is_whole = False

    def __init__(
        self,
        read: Callable[[], Iterable[EvalScene]],
        described: Mapping[str, Any] | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.read, self.described, self.skipped = read, dict(described or {}), list(skipped)

    def __call__(self) -> Iterable[EvalScene]:
        return iter(self.read())

    def describe(self) -> dict[str, Any]:
        return self.described


def plan_of(
    job: Job,
    scenes: Callable[[], Iterable[EvalScene]],
    protocol: Protocol,
    folder: Path,
    *,
    data: Mapping[str, Any] | None = None,
    with_fidelity: bool = False,
    engine: Engine = local,
    skipped: Sequence[Skipped] = (),
) -> Plan:
    source: Any = Given(scenes, data, skipped)
    return Plan(job, source, protocol, folder, fidelity=with_fidelity, engine=engine)


def evaluate(*arguments: Any, **options: Any) -> Evaluation:
    """Predict and score; arguments are those of `plan_of`."""
    plan = plan_of(*arguments, **options)
    return score(plan, predict(plan))
