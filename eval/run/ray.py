"""Evaluation on many workers: scenes as Ray tasks on actors that each load the model once.

Every actor writes its predictions into the run's folder, which all machines of the cluster must see under one path.
Scores are made by the process that asked, from what is on disk, so they are those of the local engine.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoaccel.errors import DiskFull, MissingPackage, UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.engines import Outcome, predict_one, reason_to_go_on
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.made_by import made_by
from geoaccel.eval.run.store import Store
from geoaccel.runtime import in_words

MAX_RETRIES = 3
KNOCK_SECONDS = 10


class Worker:
    """One actor: a loaded model and the store."""

    def __init__(self, job: Job, folder: str) -> None:
        self.predictor = Predictor(job)
        self.store = Store.open(folder)

    def made_by(self) -> dict[str, Any]:
        """The record that this worker's predictions carry."""
        return self.predictor.made_by

    def predict(self, scene: EvalScene) -> str | None:
        """Predict a scene; None, or the reason why there is no prediction."""
        return None if scene.name in self.store else predict_one(self.predictor, scene, self.store)


@dataclass(frozen=True)
class RayEngine:
    """Predicts on a Ray cluster.

    Args:
        address: Of a cluster that is there (``auto`` finds the one of this machine); None starts one for this run.
        actors: Workers; None takes as many as the cluster has GPUs (CUDA) or half its CPUs.
        cpus: CPUs, and threads, of each worker; None shares what there is. With as many threads as another engine had,
            scores are the same to the last bit.
        gpus: GPUs of each worker, fractions allowed; None is one on CUDA and none on a CPU.

    Raises:
        ValueError: If Ray is not installed, the cluster cannot be reached, or it is too small for one worker.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float | None = None

    def __call__(self, job: Job, scenes: Iterable[EvalScene], store: Store) -> Iterator[Outcome]:
        ray = connect(self.address)
        gpus = self.gpus if self.gpus is not None else float(job.device.startswith("cuda"))
        available = ray.cluster_resources()
        actors = self.actors or int(available.get("GPU", 0) / gpus if gpus else available.get("CPU", 2) / 2) or 1
        cpus = self.cpus or max(1, int(available.get("CPU", 1) / actors))
        if actors * cpus > available.get("CPU", 0) or actors * gpus > available.get("GPU", 0):
            raise UserError(
                f"{actors} worker(s) of {cpus} CPU and {gpus:g} GPU do not fit the cluster "
                f"({available.get('CPU', 0):g} CPU, {available.get('GPU', 0):g} GPU); "
                "set ray.actors, ray.cpus or ray.gpus lower"
            )
        # A worker that dies is started again, and what it was at is tried again on any of them.
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=MAX_RETRIES)(Worker)
        environment = {"env_vars": {"OMP_NUM_THREADS": str(cpus)}}
        folder = str(Path(store.folder).resolve())
        workers = [remote.options(runtime_env=environment).remote(job, folder) for _ in range(actors)]
        try:
            makers = [ray.get(worker.made_by.remote()) for worker in workers]
            _require_same_code(makers, job)
            yield from _in_order(ray, workers, scenes, store, makers)
        finally:
            for worker in workers:
                ray.kill(worker)


def _require_same_code(makers: Iterable[Mapping[str, Any]], job: Job) -> None:
    """Predictions of one run are of one code."""
    own = made_by(job.device, job.modules)["code"]
    for maker in makers:
        if maker["code"] != own:
            raise UserError(
                f"a worker on {in_words(maker)} runs other code of geoaccel ({maker['code']}) than this process "
                f"({own}); install the same on all machines"
            )


def _in_order(
    ray: Any, workers: list[Any], scenes: Iterable[EvalScene], store: Store, makers: Collection[Mapping[str, Any]]
) -> Iterator[Outcome]:
    """Hand scenes out to the worker that has least to do; give them back in the order of the data set."""
    load = dict.fromkeys(range(len(workers)), 0)
    pending: deque[tuple[EvalScene, Any, int]] = deque()
    for scene in scenes:
        if store.holds(scene, makers):
            pending.append((scene, None, -1))
        else:
            chosen = min(load, key=lambda worker: load[worker])
            load[chosen] += 1
            pending.append((scene, workers[chosen].predict.remote(scene), chosen))
        while len(pending) > 2 * len(workers):
            yield _finish(ray, pending.popleft(), load)
    while pending:
        yield _finish(ray, pending.popleft(), load)


def _finish(ray: Any, entry: tuple[EvalScene, Any, int], load: dict[int, int]) -> Outcome:
    scene, result, worker = entry
    if result is None:
        return scene, None
    load[worker] -= 1
    try:
        return scene, ray.get(result)
    except ray.exceptions.RayActorError:
        return scene, f"its worker died {MAX_RETRIES + 1} times; is there enough memory?"
    except ray.exceptions.RayTaskError as error:
        reason = reason_to_go_on(error.cause)
        if isinstance(error.cause, DiskFull):
            raise error.cause from None
        if reason is None:
            raise
        return scene, reason


def connect(address: str | None) -> Any:
    """Ray, connected to a cluster.

    Raises:
        MissingPackage: If it is not installed.
        ValueError: If it is not there.
    """
    try:
        import ray
    except ImportError:
        raise MissingPackage("engine=ray needs Ray, which is not installed: pip install 'geoaccel[ray]'") from None
    if not ray.is_initialized():
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no Ray cluster at ray.address={address}: {reason}") from None
    return ray


def _knock(address: str | None) -> None:
    """Ray waits minutes for a cluster that is not there; a closed port is known at once."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
