"""Tasks run by workers or in this process, with results in the order of the tasks."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from geoaccel.errors import MissingPackage, UserError
from geoaccel.fingerprint import of_sources
from geoaccel.freed_memory import give_back_freed_memory
from geoaccel.measured import SWITCH
from geoaccel.workers.actor import Logged, Worker
from geoaccel.workers.cluster import Team, connect, machines, require_same_code

logger = logging.getLogger(__name__)

MAX_RETRIES = 3
SILENT_SECONDS = 60
"""After so long it is looked whether a worker's machine is still there; one that is not started elsewhere in as long
again is given up."""
PAUSE_SECONDS = 1
AHEAD = 2
"""Tasks submitted to each worker before the first of them is done."""

Task = tuple[Any, Sequence[Any] | None]
"""A name of any type, and a function with its arguments; None instead: nothing to do."""


@dataclass(frozen=True)
class Done:
    """A finished task.

    Attributes:
        name: Name of the task.
        value: Its result.
        error: Its error, if there is no result.
        logged: Warnings of the task.
    """

    name: Any
    value: Any = None
    error: Exception | None = None
    logged: Sequence[Logged] = ()

    def get(self) -> Any:
        """The result, after logging its warnings; raises the error instead if there is one."""
        if self.error is not None:
            raise self.error
        for name, level, line in self.logged:
            logging.getLogger(name).log(level, "%s", line)
        return self.value


class Here:
    """Runs tasks in this process.

    Args:
        kept: First argument of all tasks.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def ask(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of what is kept says."""
        return [work(self.kept, *args)]

    def in_order(self, tasks: Iterable[Task], *, beside: bool = False) -> Iterator[Done]:
        """Run one task after the other; see `Workers.in_order`."""
        kept = () if beside else (self.kept,)
        for name, task in tasks:
            yield Done(name, None if task is None else task[0](*kept, *task[1:]))


class Workers:
    """Actors on a Ray cluster, for the duration of a block.

    A worker that dies is restarted, and its task repeated, at most `MAX_RETRIES` times.

    Args:
        team: Number and location of workers.
        load: Creates the object that each worker keeps, the first argument of all tasks that are not ``beside`` it;
            runs on first use.
        given: Arguments of `load`; sent to every machine once.

    Raises:
        MissingPackage: Ray is not installed.
        UserError: The cluster is not reachable, is too small, or has a different version of this package.
    """

    def __init__(self, team: Team, load: Callable[..., Any], *given: Any) -> None:
        self.team, self.load, self.given = team, load, given
        self._actors: dict[int, Any] = {}
        self._where: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._actors)

    def __enter__(self) -> Self:
        ray = self._ray = connect(self.team.address)
        actors, cpus = self.team.fitted(machines(ray))
        options: Any = {"num_cpus": cpus, "num_gpus": self.team.gpus, "max_restarts": -1}
        # What is done beside the model does not wait for it, and a question whether a worker is there for neither.
        groups = {"kept": 1, "beside": 1, "who": 1}
        remote = ray.remote(max_task_retries=MAX_RETRIES, concurrency_groups=groups, **options)(Worker)
        variables = {"OMP_NUM_THREADS": str(cpus)}
        variables |= {SWITCH: os.environ[SWITCH]} if SWITCH in os.environ else {}
        self._source = (self.load, [ray.put(value) for value in self.given])
        for number in range(actors):
            self._actors[number] = remote.options(runtime_env={"env_vars": variables}).remote()
        try:
            self._require_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def _require_all(self) -> None:
        """Wait for all workers, which must run the same code.

        Raises:
            UserError: One cannot start, or has another.
        """
        refs = [self._submit(number, None, False) for number in self._actors]
        started, missing = self._ray.wait(refs, num_returns=len(refs), timeout=SILENT_SECONDS)
        if missing:
            words = "%d of %d workers run so far; the cluster may be busy (`ray status`)"
            logger.warning(words, len(started), len(refs))
        try:
            found = [self._result(ref).get() for ref in refs]
        except _Died as error:
            reason = next(iter(reversed(str(error.__cause__).strip().splitlines())), "")
            raise UserError(
                f"a worker cannot start ({reason}); install this package on all machines of the cluster"
            ) from None
        require_same_code(found, of_sources(("",)))
        self._where = {number: who["node"] for number, who in zip(self._actors, found, strict=True)}

    def ask(self, work: Callable[..., Any], *args: Any, beside: bool = False) -> list[Any]:
        """What a function of what is kept says on each worker.

        Args:
            work: The function.
            args: Of the function, after what is kept.
            beside: It is not given what is kept.
        """
        refs = [self._submit(number, (work, *args), beside) for number in self._actors]
        return [self._result(ref).get() for ref in refs]

    def in_order(self, tasks: Iterable[Task], *, beside: bool = False) -> Iterator[Done]:
        """Submit tasks to the least busy worker, and yield results in the order of the tasks.

        Tasks are asked for as workers are free: `AHEAD` for each of them are under way, and no more results wait.

        Args:
            tasks: Names with functions and their arguments. What is kept comes before the arguments.
            beside: Functions are not given what is kept, and do not wait for those that are.

        Yields:
            Every finished task. A worker that died too often, lack of memory, and errors that the user can fix are
            errors of the task; anything else is raised.
        """
        load = dict.fromkeys(self._actors, 0)
        pending: deque[tuple[Any, Sequence[Any] | None, Any, int]] = deque()
        source, failed = iter(tasks), None
        while True:
            try:
                name, task = next(source)
            except StopIteration:
                break
            except Exception as error:  # what was handed out before it is done first, as one process would have
                failed = error
                break
            pending.append((name, task, *self._hand_out(task, load, beside)))
            while len(pending) > AHEAD * len(self._actors):
                yield self._finished(*pending.popleft(), load, beside)
        while pending:
            yield self._finished(*pending.popleft(), load, beside)
        if failed is not None:
            raise failed

    def _hand_out(self, task: Sequence[Any] | None, load: dict[int, int], beside: bool) -> tuple[Any, int]:
        if task is None:
            return None, -1
        number = min(self._actors, key=lambda one: load[one])
        load[number] += 1
        return self._submit(number, task, beside), number

    def _submit(self, number: int, task: Sequence[Any] | None, beside: bool) -> Any:
        actor = self._actors[number]
        if task is None:
            return actor.who.options(concurrency_group="who").remote()
        if beside:
            return actor.beside.options(concurrency_group="beside").remote(*task)
        return actor.do.options(concurrency_group="kept").remote(self._source, *task)

    def _finished(
        self, name: Any, task: Sequence[Any] | None, ref: Any, number: int, load: dict[int, int], beside: bool
    ) -> Done:
        if task is None:
            return Done(name)
        while True:
            if self._ray.wait([ref], timeout=SILENT_SECONDS, fetch_local=False)[0]:
                give_back_freed_memory()  # of the results before, which are large
                done = self._result(ref, name)
                # Where the machine is gone it is not the work that is at fault.
                lost = isinstance(done.error, _Lost | _Died) and (
                    not self._is_there(number) or isinstance(done.error, _Lost)
                )
                if not lost:
                    load[number] -= 1
                    return done
            elif self._where.get(number) in self._alive() or self._is_there(number):
                continue
            load[number] -= 1  # the worker may be back, without it
            ref, number = self._hand_out(task, load, beside)

    def _is_there(self, number: int) -> bool:
        """Whether a worker answers from the machine where it was; one whose machine is gone is given up.

        Raises:
            UserError: It was the last one.
        """
        ray = self._ray
        while number in self._actors:
            ref = self._submit(number, None, False)
            try:
                if ray.wait([ref], timeout=SILENT_SECONDS)[0]:
                    before, self._where[number] = self._where[number], ray.get(ref)[0]["node"]
                    return bool(before == self._where[number])
            except ray.exceptions.RayActorError:  # it is being started again, or the machine has just gone
                time.sleep(PAUSE_SECONDS)
            if self._where[number] not in self._alive():
                ray.kill(self._actors.pop(number))
        if not self._actors:
            raise UserError("no worker is left: all their machines are gone; check `ray status`")
        return False

    def _alive(self) -> set[str]:
        """Machines that the cluster has."""
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}

    def _result(self, ref: Any, name: Any = None) -> Done:
        ray = self._ray
        try:
            value, lines = ray.get(ref)
        except ray.exceptions.ObjectLostError:
            return Done(name, error=_Lost("the machine that had the result is gone"))
        except ray.exceptions.RayActorError as error:
            died = _Died(f"its worker died {MAX_RETRIES + 1} times; is there enough memory?")
            died.__cause__ = error
            return Done(name, error=died)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | OSError | MissingPackage):
                return Done(name, error=error.cause)
            raise
        return Done(name, value, logged=lines)


class _Died(UserError):
    """A worker died."""


class _Lost(UserError):
    """A result was lost with its machine."""
