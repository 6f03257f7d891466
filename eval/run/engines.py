"""Engines that predict scenes: this process, or Ray workers on one or many machines.

An engine takes scenes and yields each when its prediction is on disk, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from geoaccel.errors import DiskFull
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.made_by import made_by
from geoaccel.eval.run.store import Store
from geoaccel.workers import reason_to_go_on

Outcome = tuple[EvalScene, str | None]


class Engine(Protocol):
    """Predicts scenes."""

    def __call__(self, job: Job, scenes: Iterable[EvalScene], store: Store) -> Iterator[Outcome]:
        """Yield every scene, in the order given, with None or with the reason why it could not be predicted.

        A scene whose prediction :meth:`geoaccel.eval.run.store.Store.holds` is not predicted again.
        """
        ...


def local(job: Job, scenes: Iterable[EvalScene], store: Store) -> Iterator[Outcome]:
    """Predicts scenes one by one in this process; the model is loaded when the first scene needs it."""
    predictor: Predictor | None = None
    makers = [made_by(job.device, job.modules)]
    for scene in scenes:
        reason = None
        if not store.holds(scene, makers):
            if predictor is None:
                predictor = Predictor(job, store.auto)
            reason = predict_one(predictor, scene, store)
        yield scene, reason


def predict_one(predictor: Predictor, scene: EvalScene, store: Store) -> str | None:
    """Predict a scene and store the prediction; returns None, or the reason why there is none."""
    try:
        store.write(scene.name, predictor(scene, store.unfinished(scene.name)))
    except DiskFull as error:
        kept = "predictions of finished scenes are kept, and the same command goes on from there"
        raise DiskFull(f"{error}; {kept}") from error
    except Exception as error:
        reason = reason_to_go_on(error)
        if reason is None:
            raise
        return reason
    return None
