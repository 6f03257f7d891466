"""Workers on a cluster that is made up: who gets what, in which order results come, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from geoaccel.errors import DiskFull, UserError
from geoaccel.workers import Done, Here, Team, Workers, check_engine, device_for, pool
from geoaccel.workers.actor import Worker, _named
from geoaccel.workers.cluster import require_same_code


@pytest.mark.parametrize(
    ("team", "machines", "found"),
    [
        (Team(), [(16, 0)], (1, 16)),
        (Team(), [(8, 0), (4, 0), (0, 0)], (2, 4)),
        (Team(actors=4), [(16, 0)], (4, 4)),
        (Team(actors=1), [(1, 0), (1, 0)], (1, 1)),  # not one of two CPUs, which no machine has
        (Team(actors=3, cpus=2), [(4, 0), (3, 0)], (3, 2)),
        (Team(gpus=1), [(16, 4), (8, 2)], (6, 4)),
        (Team(gpus=0.5), [(8, 1), (64, 0)], (2, 4)),
        (Team(gpus=0.1), [(32, 1)], (10, 3)),
    ],
)
def test_workers_are_fitted_to_machines(team: Team, machines: Any, found: tuple[int, int]) -> None:
    assert team.fitted(machines) == found


@pytest.mark.parametrize(
    ("team", "machines"),
    [
        (Team(actors=5, cpus=1), [(1, 0), (1, 0)]),
        (Team(actors=1, cpus=2), [(1, 0), (1, 0)]),
        (Team(gpus=1), [(16, 0)]),
        (Team(), []),
    ],
)
def test_workers_that_do_not_fit_are_one_line(team: Team, machines: Any) -> None:
    with pytest.raises(UserError, match=r"worker\(s\) of .* do not fit the cluster") as raised:
        team.fitted(machines)
    assert "\n" not in str(raised.value)


def test_where_workers_run_a_model() -> None:
    assert device_for("auto", [(4, 0), (4, 1)]) == "cuda"
    assert device_for("auto", [(4, 0)]) == device_for("cpu", [(4, 1)]) == "cpu"
    with pytest.raises(UserError, match="knows of no GPU"):
        device_for("cuda", [(4, 0)])
    with pytest.raises(UserError, match="--device cuda:1: Ray gives every worker its own GPU"):
        device_for("cuda:1", [(4, 2)])


def test_other_code_is_refused() -> None:
    require_same_code([{"host": "a", "code": "own"}], "own")
    with pytest.raises(UserError, match=r"a worker on b runs different code of geoaccel \(abc\) from this process"):
        require_same_code([{"host": "a", "code": "own"}, {"host": "b", "code": "abc"}], "own")


def test_engines() -> None:
    check_engine("local", None)
    with pytest.raises(UserError, match="Did you mean 'ray'"):
        check_engine("rey", None)
    with pytest.raises(UserError, match="applies to engine ray"):
        check_engine("local", "auto")


class Cluster:
    """Stands in for Ray: work is done when its result is asked for, unless the machine of its worker is gone."""

    class exceptions:
        class RayActorError(Exception): ...

        class ObjectLostError(Exception): ...

        class RayTaskError(Exception): ...

    def __init__(self) -> None:
        self.gone: set[int] = set()  # silently
        self.unreachable: set[int] = set()  # with an error
        self.moved: set[int] = set()  # started again elsewhere, which is noticed by an error
        self.noticed: set[int] = set()
        self.killed: set[int] = set()
        self.lost: list[bool] = []
        self.dying = False

    def nodes(self) -> list[dict[str, Any]]:
        gone = self.gone | self.unreachable | self.moved
        return [{"NodeID": str(number), "Alive": number not in gone} for number in range(2)]

    def actor(self, number: int) -> Any:
        worker = Worker()
        worker._kept.append("kept")
        worker.who = lambda: ({"node": "9" if number in self.moved else str(number)}, [])  # type: ignore[method-assign]

        def method(name: str) -> Any:
            def remote(*args: Any) -> Any:
                return SimpleNamespace(number=number, name=name, run=lambda: getattr(worker, name)(*args))

            return SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=remote))

        return SimpleNamespace(number=number, **{name: method(name) for name in ("do", "beside", "who")})

    def wait(self, refs: Any, **how: Any) -> Any:
        there = [ref for ref in refs if ref.number not in self.gone or ref.number in self.killed]
        return there, [ref for ref in refs if ref not in there]

    def get(self, ref: Any) -> Any:
        if ref.number in self.killed | self.unreachable or (self.dying and ref.name != "who"):
            raise self.exceptions.RayActorError
        if ref.name != "who" and ref.number in self.moved - self.noticed:
            self.noticed.add(ref.number)
            raise self.exceptions.RayActorError
        if ref.name != "who" and self.lost and self.lost.pop():
            raise self.exceptions.ObjectLostError
        return ref.run()

    def kill(self, actor: Any) -> None:
        self.killed.add(actor.number)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(pool, "PAUSE_SECONDS", 0)
    found = Workers(Team(), lambda: "kept")
    ray = found._ray = Cluster()  # type: ignore[assignment]
    found._source = (found.load, [])
    found._actors = {number: ray.actor(number) for number in range(2)}
    found._where = {number: str(number) for number in range(2)}
    return found


def both(kept: str, number: int) -> tuple[str, int]:
    return kept, number


def test_results_come_in_order_and_little_is_under_way(workers: Workers) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[Any]:
        for number in range(9):
            drawn.append(number)
            yield number, None if number == 3 else (both, number)

    found = []
    for done in workers.in_order(tasks()):
        found.append(done.get())
        assert len(drawn) - len(found) <= pool.AHEAD * len(workers)
    assert found == [None if number == 3 else ("kept", number) for number in range(9)]
    assert found == [done.get() for done in Here("kept").in_order(tasks())]
    assert [done.get() for done in workers.in_order([(0, (both, "with", 1))], beside=True)] == [("with", 1)]


def test_what_was_handed_out_is_done_before_an_error_of_the_tasks(workers: Workers) -> None:
    def tasks() -> Iterator[Any]:
        yield from ((number, (both, number)) for number in range(3))
        raise UserError("the fourth cannot be read")

    found: list[Done] = []
    with pytest.raises(UserError, match="the fourth"):
        found.extend(workers.in_order(tasks()))
    assert [done.name for done in found] == [0, 1, 2]


@pytest.mark.parametrize("how", ["gone", "unreachable"])
def test_work_of_a_machine_that_is_gone_is_done_by_others(workers: Workers, how: str) -> None:
    cluster: Any = workers._ray
    setattr(cluster, how, {1})
    cluster.lost = [True, False]
    found = [done.get() for done in workers.in_order((n, (both, n)) for n in range(6))]
    assert found == [("kept", n) for n in range(6)]
    assert len(workers) == 1
    setattr(cluster, how, {0, 1})
    with pytest.raises(UserError, match="no worker is left"):
        list(workers.in_order([(0, (both, 0))]))


def test_work_of_a_worker_that_was_started_elsewhere_is_done_again(workers: Workers) -> None:
    cluster: Any = workers._ray
    cluster.moved = {1}
    assert [done.get() for done in workers.in_order((n, (both, n)) for n in range(4))] == [
        ("kept", n) for n in range(4)
    ]
    assert (len(workers), workers._where) == (2, {0: "0", 1: "9"})


@pytest.mark.parametrize("error", ["RayActorError", "ObjectLostError"])
def test_work_that_is_over_is_no_load_whatever_came_of_it(
    error: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that died, or whose results were lost, gets its share of the work once it is back."""
    cluster: Any = workers._ray
    loads: list[dict[int, int]] = []
    hand_out, get, losses = workers._hand_out, cluster.get, 2

    def watched(task: Any, load: dict[int, int], beside: bool) -> Any:
        loads.append(load)
        return hand_out(task, load, beside)

    def losing(ref: Any) -> Any:
        nonlocal losses
        if ref.number == 0 and ref.name != "who" and losses:
            losses -= 1
            raise getattr(cluster.exceptions, error)
        return get(ref)

    monkeypatch.setattr(workers, "_hand_out", watched)
    monkeypatch.setattr(cluster, "get", losing)
    found = list(workers.in_order((number, (both, number)) for number in range(8)))
    assert losses == 0
    assert len([done for done in found if done.error is not None]) == (2 if error == "RayActorError" else 0)
    assert loads[-1] == {0: 0, 1: 0}


def failing(kept: str, error: Exception) -> None:
    raise error


def test_a_worker_that_dies_too_often_is_an_error_of_its_work(workers: Workers) -> None:
    workers._ray.dying = True  # type: ignore[attr-defined]
    (done,) = workers.in_order([(0, (both, 0))])
    with pytest.raises(UserError, match="its worker died 4 times; is there enough memory"):
        done.get()


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (UserError("a.jpg is cut short"), UserError, r"^on [^:]+: a.jpg is cut short$"),
        (FileNotFoundError("there is no /a.jpg"), UserError, "no /a.jpg .every machine of the cluster has to have"),
        (MemoryError("too large\nreally"), UserError, "too large$"),
        (DiskFull("no room"), DiskFull, "no room"),
        (KeyError("a fault"), KeyError, "a fault"),
    ],
)
def test_what_went_wrong_says_where(error: Exception, kind: type[Exception], line: str) -> None:
    with pytest.raises(kind, match=line) as raised:
        _named(lambda: failing("", error))
    assert type(raised.value) is kind


def warning(kept: str) -> str:
    logging.getLogger("geoaccel.images.load").warning("%d of 3 are odd", 2)
    return kept


def test_warnings_come_along(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    worker._kept.append("made")
    value, logged = worker.do((failing, []), warning)
    assert value == "made"
    caplog.clear()
    assert Done(0, value, logged=logged).get() == "made"
    assert caplog.messages == ["2 of 3 are odd"]
