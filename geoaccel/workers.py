"""Work on many machines: Ray actors that keep what takes long to load, and results in the order of the work.

    with Workers(Team(address="auto"), load) as workers:
        for done in workers.in_order((name, (work, images)) for name, images in scenes):
            result = done.get()  # of work(load(), images)

`Here` does the same in this process. Workers get what they are to do with the work itself, and what they find comes
back with the result: only files that the work reads by its own have to be on all machines.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from geoaccel.errors import DiskFull, MissingPackage, UserError
from geoaccel.fingerprint import of_sources
from geoaccel.measured import SWITCH
from geoaccel.registry import unknown

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
MAX_RETRIES = 3
KNOCK_SECONDS = 10
SILENT_SECONDS = 60
"""A worker that takes longer than this over its work, and as long again to say that it is there, is given up."""
AHEAD = 2
"""Pieces of work for each worker that are handed out before the first of them is done."""
CPU_ALLOCATOR = "DefaultCPUAllocator"
"""What a CPU says that has no memory left: torch has a class of its own for CUDA alone."""

Task = tuple[Any, Sequence[Any] | None]
"""A name of any kind, and a function with what it is given; None in place of it: there is nothing to do."""


@dataclass(frozen=True)
class Done:
    """A piece of work that is done.

    Attributes:
        name: As it was handed out.
        value: That came back.
        error: Why nothing did.
    """

    name: Any
    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """What came back; or the error is raised."""
        if self.error is not None:
            raise self.error
        return self.value


class Here:
    """This process, with what it keeps.

    Args:
        kept: First argument of all that is asked.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def ask(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of what is kept says."""
        return [work(self.kept, *args)]

    def in_order(self, tasks: Iterable[Task], *, beside: bool = False) -> Iterator[Done]:
        """Do one piece of work after the other; see `Workers.in_order`."""
        kept = () if beside else (self.kept,)
        for name, task in tasks:
            yield Done(name, None if task is None else task[0](*kept, *task[1:]))


@dataclass(frozen=True)
class Team:
    """How many workers there are, and where.

    Attributes:
        address: Of a cluster that is there (``auto`` finds the one of this machine); None starts one for this run.
        actors: Workers; None: one for each GPU where they are to have one, else one for each machine.
        cpus: CPUs, and threads, of each; None: as many as they can all have.
        gpus: GPUs of each, fractions allowed.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float = 0.0

    def fitted(self, machines: Sequence[tuple[float, float]]) -> tuple[int, int]:
        """Workers, and CPUs of each.

        Args:
            machines: CPUs and GPUs of each machine of the cluster.

        Raises:
            UserError: It is too small for one, or for as many as were asked for.
        """

        def room(cpus: int) -> int:
            by_gpu = (int(g / self.gpus + 1e-9) if self.gpus else int(c) for c, g in machines)
            return sum(min(int(c) // cpus, most) for (c, _), most in zip(machines, by_gpu, strict=True))

        largest = max((int(c) for c, _ in machines), default=0)
        actors = self.actors
        if actors is None:
            actors = room(1) if self.gpus else sum(c >= (self.cpus or 1) for c, _ in machines)
        cpus = self.cpus or next((n for n in range(largest, 0, -1) if room(n) >= actors), 1)
        if actors < 1 or room(cpus) < actors:
            total = [sum(column) for column in zip(*machines, strict=True)] or [0, 0]
            raise UserError(
                f"{max(1, actors)} worker(s) of {cpus} CPU and {self.gpus:g} GPU do not fit the cluster "
                f"({total[0]:g} CPU, {total[1]:g} GPU on {len(machines)} machine(s)); take fewer or smaller workers "
                "(ray.actors, ray.cpus, ray.gpus in settings), or a larger cluster"
            )
        return actors, cpus


class Workers:
    """Actors on a Ray cluster, from the beginning of a block to its end.

    A worker that dies is started again, and what it was at is done again, `MAX_RETRIES` times at most.

    Args:
        team: How many, and where.
        load: Makes what each worker keeps: the first argument of all work that is not done ``beside`` it. It runs when
            it is first needed.
        given: Arguments of `load`; sent to every machine once.

    Raises:
        MissingPackage: Ray is not installed.
        UserError: The cluster is not there, is too small, or has other code of this package.
    """

    def __init__(self, team: Team, load: Callable[..., Any], *given: Any) -> None:
        self.team, self.load, self.given = team, load, given
        self._actors: dict[int, Any] = {}

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
        given = [ray.put(value) for value in self.given]
        for number in range(actors):
            self._actors[number] = remote.options(runtime_env={"env_vars": variables}).remote(self.load, *given)
        try:
            self._wait_for_all()
            require_same_code(self.ask(None), of_sources(("",)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def _wait_for_all(self) -> None:
        """Say it where the cluster takes long over starting the workers: others may be using it."""
        refs = [self._submit(number, None, False) for number in self._actors]
        started, missing = self._ray.wait(refs, num_returns=len(refs), timeout=SILENT_SECONDS)
        if missing:
            logger.warning(
                "%d of %d workers run so far; the cluster may be busy (`ray status`)", len(started), len(refs)
            )

    def ask(self, work: Callable[..., Any] | None, *args: Any, beside: bool = False) -> list[Any]:
        """What a function of what is kept says on each worker.

        Args:
            work: The function; None: who they are, as `Worker.who` says it.
            args: Of the function, after what is kept.
            beside: It is not given what is kept.
        """
        task = None if work is None else (work, *args)
        refs = [self._submit(number, task, beside) for number in self._actors]
        return [self._result(ref).get() for ref in refs]

    def in_order(self, tasks: Iterable[Task], *, beside: bool = False) -> Iterator[Done]:
        """Hand work out to the worker that has least to do, and give results in the order of the work.

        Tasks are asked for as workers are free: `AHEAD` for each of them are under way, and no more results wait.

        Args:
            tasks: Names with functions and their arguments. What is kept comes before the arguments.
            beside: Functions are not given what is kept, and do not wait for those that are.

        Yields:
            Every piece of work, with what came of it. A worker that died too often, no memory, and what the user can
            put right are errors of the piece; anything else is raised.
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
        return actor.do.options(concurrency_group="kept").remote(*task)

    def _finished(
        self, name: Any, task: Sequence[Any] | None, ref: Any, number: int, load: dict[int, int], beside: bool
    ) -> Done:
        if task is None:
            return Done(name)
        while True:
            if not self._ray.wait([ref], timeout=SILENT_SECONDS, fetch_local=False)[0]:
                if number in self._actors and self._is_there(number):
                    continue
            elif (done := self._result(ref, name)) and (number in self._actors or not isinstance(done.error, _Died)):
                load[number] -= 1
                return done
            ref, number = self._hand_out(task, load, beside)

    def _is_there(self, number: int) -> bool:
        """Whether a worker answers; one that does not, as its machine is gone, is given up.

        Raises:
            UserError: It was the last one.
        """
        if self._ray.wait([self._submit(number, None, False)], timeout=SILENT_SECONDS)[0]:
            return True
        self._ray.kill(self._actors.pop(number))
        if not self._actors:
            raise UserError("no worker is left: no machine of the cluster answers; look at `ray status`")
        return False

    def _result(self, ref: Any, name: Any = None) -> Done:
        ray = self._ray
        try:
            return Done(name, ray.get(ref))
        except ray.exceptions.RayActorError:
            return Done(name, error=_Died(f"its worker died {MAX_RETRIES + 1} times; is there enough memory?"))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | OSError | MissingPackage):
                return Done(name, error=error.cause)
            raise


class _Died(UserError):
    """A worker is no more."""


class Worker:
    """One actor: it makes what it keeps when that is first needed, and does what it is told."""

    def __init__(self, load: Callable[..., Any], *given: Any) -> None:
        self._load: Callable[[], Any] | None = lambda: load(*given)
        self._kept: Any = None

    def do(self, work: Callable[..., Any], *args: Any) -> Any:
        """A function of what is kept."""
        if self._load is not None:
            self._kept = _named(self._load, files=True)
            self._load = None
        return _named(lambda: work(self._kept, *args))

    def beside(self, work: Callable[..., Any], *args: Any) -> Any:
        """A function of its arguments alone."""
        return _named(lambda: work(*args))

    def who(self) -> dict[str, Any]:
        """Its machine and its code."""
        return {"host": socket.gethostname(), "code": of_sources(("",))}


def _named(work: Callable[[], Any], *, files: bool = False) -> Any:
    """Do it; what the user can put right names the machine, and where that may help, says what machines must share."""
    try:
        return work()
    except Exception as error:
        reason = reason_to_go_on(error)
        line = f"on {socket.gethostname()}: {reason or _one_line(error)}"
        if isinstance(error, DiskFull | MissingPackage):
            raise type(error)(line) from None
        if reason is None:
            raise
        if files or isinstance(error, OSError):
            line += " (every machine of the cluster has to have the files of a run under the same paths)"
        raise UserError(line) from None


def reason_to_go_on(error: Exception) -> str | None:
    """The reason why one piece of work failed, in one line: bad data, or more than fits in memory; others go on.

    None for a full disk, which nothing else fits on either, and for anything else: that is a fault of ours, and no
    result of the others could be trusted.
    """
    if isinstance(error, DiskFull):
        return None
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)
    return _one_line(error) if no_memory or isinstance(error, UserError | OSError) else None


def require_same_code(found: Iterable[Mapping[str, Any]], own: str) -> None:
    """Results of one run are of one code.

    Args:
        found: As of `Worker.who`.
        own: Code of this process.

    Raises:
        UserError: Naming the machine that has another one.
    """
    for one in found:
        if one["code"] != own:
            raise UserError(
                f"a worker on {one['host']} runs other code of geoaccel ({one['code']}) than this process ({own}); "
                "install the same on all machines"
            )


def check_engine(engine: str, address: str | None) -> None:
    """Refuse an engine that there is not, and an address that nobody will look at.

    Raises:
        UserError: Saying what there is.
        MissingPackage: Ray is not installed.
    """
    if engine not in ENGINES:
        raise UserError(unknown("engine", engine, list(ENGINES)))
    if engine == "ray":
        require_ray()
    elif address is not None:
        raise UserError(
            f"ray_address={address} (--ray-address) is for engine ray; give --engine ray (engine='ray'), too, or leave "
            "it out"
        )


def machines(ray: Any) -> list[tuple[float, float]]:
    """CPUs and GPUs of every machine of a cluster."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def require_ray() -> Any:
    """Ray.

    Raises:
        MissingPackage: It is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingPackage(
            "engine=ray (--engine ray) needs Ray, which is not installed: pip install 'geoaccel[ray]'"
        ) from None
    return ray


def connect(address: str | None) -> Any:
    """Ray, connected to a cluster.

    Args:
        address: As of `Team`.

    Raises:
        MissingPackage: Ray is not installed.
        UserError: The cluster is not there.
    """
    ray = require_ray()
    if not ray.is_initialized():
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"no Ray cluster at {address} ({reason}); give the HOST:PORT that `ray start --head` printed, auto for "
                "the cluster of this machine, or leave it out to start one for this run"
            ) from None
    return ray


def _knock(address: str | None) -> None:
    """Ray waits minutes for a cluster that is not there; a closed port is known at once."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
