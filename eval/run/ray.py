"""Evaluation on many workers: scenes as tasks for Ray actors (`geoaccel.workers`) that each load the model once.

Every actor writes its predictions into the run's folder, which all machines of the cluster must see under the same
path. Scores are computed by the calling process from the files, so they equal those of the local engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geoaccel.errors import DiskFull, UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.engines import Outcome, predict_one
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.sequences import AutoLengths
from geoaccel.eval.run.store import Store
from geoaccel.windows.predict import Lengths
from geoaccel.workers import Done, Task, Team, Workers, connect, machines, reason_to_go_on


class Station:
    """State of a worker: a loaded model and the store."""

    def __init__(self, job: Job, folder: str, auto: AutoLengths | None) -> None:
        self.predictor = Predictor(job, auto)
        self.store = Store.open(folder)

    def made_by(self) -> dict[str, Any]:
        """The provenance of this worker's predictions."""
        return self.predictor.made_by

    def fitting(self, scene: EvalScene) -> Lengths | str:
        """Windows that fit in this worker's memory, or why none do."""
        try:
            return self.predictor.fitting(scene)
        except (UserError, OSError) as error:
            return str(error)

    def predict(self, scene: EvalScene) -> str | None:
        """Predict a scene; returns None, or the reason why there is no prediction."""
        return None if scene.name in self.store else predict_one(self.predictor, scene, self.store)


@dataclass(frozen=True)
class RayEngine:
    """Predicts on a Ray cluster.

    Args:
        address: Address of an existing cluster (``auto`` finds this machine's); None starts one for this run.
        actors: Workers; None: as many as the cluster has GPUs (CUDA) or half its CPUs.
        cpus: CPUs, and threads, per worker; None divides those available. With the same number of threads as another
            engine, scores are bit-identical.
        gpus: GPUs per worker, fractions allowed; None: one on CUDA and none on a CPU.

    Raises:
        ValueError: If Ray is not installed, the cluster cannot be reached, or it is too small for one worker.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float | None = None

    def __call__(self, job: Job, scenes: Iterable[EvalScene], store: Store) -> Iterator[Outcome]:
        gpus = self.gpus if self.gpus is not None else float(job.device.startswith("cuda"))
        actors = self.actors
        if actors is None and not gpus:
            actors = max(1, int(sum(cpus for cpus, _ in machines(connect(self.address)))) // 2)
        team = Team(self.address, actors, self.cpus, gpus)
        auto = None if store.auto is None else replace(store.auto, path=store.auto.path.resolve())
        with Workers(team, Station, job, str(Path(store.folder).resolve()), auto) as workers:
            makers = workers.ask(Station.made_by)

            def tasks() -> Iterator[Task]:
                for scene in scenes:
                    missing = not store.holds(scene, makers)
                    if missing and auto is not None and auto.read() is None:
                        _fit_all(auto, workers.ask(Station.fitting, scene))
                    yield scene, (Station.predict, scene) if missing else None

            for done in workers.in_order(tasks()):
                yield done.name, _reason(done)


def _fit_all(auto: AutoLengths, found: Sequence[Lengths | str]) -> None:
    """Choose windows that fit on every worker; none if no worker can fit any, as each scene then reports.

    Raises:
        ValueError: If none fit on some of them.
    """
    fitting = [lengths for lengths in found if not isinstance(lengths, str)]
    reasons = [reason for reason in found if isinstance(reason, str)]
    if fitting and reasons:
        raise UserError(
            f"windows=auto: no window fits on {len(reasons)} of {len(found)} workers ({reasons[0]}); give a number, "
            "such as windows=8, or leave those machines out"
        )
    if fitting:
        auto.keep(min(fitting, key=lambda lengths: lengths.window))


def _reason(done: Done) -> str | None:
    if isinstance(done.error, DiskFull):
        raise done.error
    return done.get() if done.error is None else reason_to_go_on(done.error)
