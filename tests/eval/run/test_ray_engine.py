"""Ray workers on a cluster of two nodes give what one process gives, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import evaluate
from tiny_checkpoint import write_checkpoint
from two_nodes import one_thread, two_nodes

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.ray import RayEngine, _fit_all
from geoaccel.eval.run.runner import predict, score
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.sequences import AutoLengths, Windows
from geoaccel.eval.run.source import Source
from geoaccel.windows.predict import Lengths
from geoaccel.workers import Here, Team

pytest.importorskip("scipy")

SOURCE = Source("synthetic", frames=2, scenes=6, options={"size": [28, 28]})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes(__name__) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


@dataclass(frozen=True)
class DieOnce:
    """Reads an image, but kills the process that asks first."""

    read: Any
    marker: Path

    def __call__(self) -> torch.Tensor:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.read()


def broken(marker: Path | None) -> Iterator[EvalScene]:
    """The scenes; one kills its worker once, and one cannot be read."""
    for index, scene in enumerate(SOURCE()):
        first = scene.frames[0]
        if index == 2 and marker is not None:
            first = replace(first, read_image=DieOnce(first.read_image, marker))
        if index == 4:
            first = replace(first, read_image=_unreadable)
        yield replace(scene, frames=(first, *scene.frames[1:]))


def _unreadable() -> torch.Tensor:
    raise UserError("cut short")


@pytest.mark.slow
def test_two_nodes_and_a_killed_worker_give_the_bytes_of_one_process(
    cluster: Any, checkpoint: Path, tmp_path: Path
) -> None:
    job = Job(str(checkpoint), resize=False)
    with one_thread():
        local = evaluate(job, partial(broken, None), Protocol(), tmp_path / "local", data={})
    engine = RayEngine(address=cluster.address, actors=2, cpus=1)
    marker = tmp_path / "died"
    remote = evaluate(job, partial(broken, marker), Protocol(), tmp_path / "ray", data={}, engine=engine)
    assert marker.exists()
    assert remote.failed == local.failed == {"seed000000004": "cut short"}
    assert (tmp_path / "ray" / "scores.json").read_bytes() == (tmp_path / "local" / "scores.json").read_bytes()


@pytest.mark.slow
def test_sequences_in_windows_are_those_of_one_process(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    source = Source("long_paths", frames=12, scenes=2, options={"size": [28, 28]})
    job = Job(str(checkpoint), resize=False, windows=Windows(6))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluate(job, source, Protocol(), tmp_path / "local", data={})
    finally:
        torch.set_num_threads(threads)
    engine = RayEngine(address=cluster.address, actors=2, cpus=1)
    assert not evaluate(job, source, Protocol(), tmp_path / "ray", data={}, engine=engine).failed
    assert (tmp_path / "ray" / "scores.json").read_bytes() == (tmp_path / "local" / "scores.json").read_bytes()


@pytest.mark.slow
def test_workers_that_do_not_fit_are_one_line(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    engine = RayEngine(address=cluster.address, actors=5, cpus=1)
    with pytest.raises(ValueError, match=r"5 worker.* do not fit the cluster"):
        evaluate(Job(str(checkpoint), resize=False), SOURCE, Protocol(), tmp_path / "run", data={}, engine=engine)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.shutdown()
    with pytest.raises(ValueError, match=r"no Ray cluster at 127.0.0.1:1"):
        next(iter(RayEngine(address="127.0.0.1:1")(Job("none"), [], None)))  # type: ignore[arg-type]


class Pretended(Here):
    """Two workers without a cluster: this process does their work."""

    def __init__(self, team: Team, load: Any, *given: Any) -> None:
        super().__init__(load(*given))

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, work: Any, *args: Any) -> list[Any]:
        return [*super().ask(work, *args), *super().ask(work, *args)]


def test_a_worker_on_which_no_window_fits_ends_the_run(tmp_path: Path) -> None:
    auto = AutoLengths(tmp_path / "lengths.json", "a")
    _fit_all(auto, ["a.jpg cannot be read"] * 2)  # the scene says so itself
    with pytest.raises(UserError, match=r"no window fits on 1 of 2 workers \(not even 3 frames .*\); give a number"):
        _fit_all(auto, [Lengths(30, 15), "not even 3 frames fit"])
    assert auto.read() is None


def test_auto_windows_fit_on_the_smallest_of_all_workers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([8, 6])  # of each worker, before the first sequence; nobody asks again
    monkeypatch.setattr("geoaccel.eval.run.ray.Workers", Pretended)
    monkeypatch.setattr(
        "geoaccel.eval.run.sequences.lengths_for", lambda *_: Lengths(frames := next(free), frames // 2)
    )
    source = Source("long_paths", frames=9, scenes=2, options={"size": [28, 28]})
    job = Job(str(checkpoint), resize=False, windows=Windows(wide=False, loops=False))
    plan = Plan(job, source, Protocol(), tmp_path / "ray", engine=RayEngine(actors=2, cpus=1))
    found = score(plan, predict(plan))
    assert not found.failed
    assert [(scene.details.about["window"], scene.details.about["overlap"]) for scene in found.scenes] == [(6, 3)] * 2
