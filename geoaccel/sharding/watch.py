"""Detects a process of a group that died, and ends this one with a line that names it.

A process in a collective waits minutes for a dead one, and then gets a broken connection. So each rank writes a
heartbeat into the group's key-value store (:class:`torch.distributed.Store`), with its state (alive, done or failed),
and a thread reads those of the others twice a second. On the same machine the process itself is checked, which works
under any load; for other machines the heartbeat has to change.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

TICK_S = 0.5
SILENT_TICKS = 14
"""A rank on another machine whose heartbeat has not changed for this many ticks, 7 s, is considered dead."""
LEFT_TICKS = 3
"""Ticks after which a rank that is done while this one waits for it has left too early."""

RELAY_TICKS = 3
"""How long a rank lives on after it detected a dead one."""

ALIVE, DONE, FAILED = "alive", "done", "failed"


@dataclass(frozen=True)
class Verdict:
    """Why this process cannot go on.

    Attributes:
        rank: The dead rank.
        line: Message for the user.
        code: Exit code: that of the rank that failed, 1 for one that died.
    """

    rank: int
    line: str
    code: int = 1


class Watch:
    """The watch of one rank over the others.

    Args:
        store: A dedicated client of the group's store: a waiting client is blocked.
        rank, size: Rank of this process, and number of processes.
        end: Called when another rank is dead; by default ends the process.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, end: Callable[[Verdict], None] | None = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._end = store, end or end_process
        self._lock, self._over = threading.Lock(), threading.Event()
        self._host, self._born = socket.gethostname(), _born(os.getpid())
        self._state: dict[str, Any] = {"is": ALIVE}
        self._beat = self._waits = 0
        self._seen: dict[int, dict[str, Any]] = {}
        self._unchanged = dict.fromkeys(range(size), 0)
        self._left = dict.fromkeys(range(size), 0)
        self._write()
        self._thread = threading.Thread(target=self._run, name="geoaccel-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """This rank is done."""
        self._say({"is": DONE})

    def failed(self, line: str, code: int) -> None:
        """This rank has failed; the others end with this line."""
        self._say({"is": FAILED, "line": f"rank {self.rank}: {line}", "code": code})

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While other ranks are needed."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def explain(self, seconds: float = 10.0) -> None:
        """Give the watch time to find out why a connection broke; it then ends the process."""
        with self.waiting():
            self._over.wait(seconds)
            time.sleep(0 if not self._over.is_set() else seconds)  # the process is about to end

    def _say(self, state: dict[str, Any]) -> None:
        if self._state["is"] == ALIVE:
            self._state = state
            with contextlib.suppress(RuntimeError):  # the store may be gone already
                self._write()

    def _write(self) -> None:
        self._beat += 1
        line = {**self._state, "host": self._host, "pid": os.getpid(), "born": self._born, "beat": self._beat}
        with self._lock:
            self._store.set(f"geoaccel/{self.rank}", json.dumps(line))

    def _run(self) -> None:
        joined = False
        while self._state["is"] == ALIVE:
            time.sleep(TICK_S)
            if joined and not dist.is_initialized():
                return  # the group is no more, and nobody needs the others
            joined = dist.is_initialized()
            try:
                verdict = self._look()
            except RuntimeError:
                verdict = self._without_store()
            if verdict is not None and self._state["is"] == ALIVE:
                self._over.set()
                self._say({"is": FAILED, "line": verdict.line, "code": verdict.code})
                time.sleep(RELAY_TICKS * TICK_S)  # the others read why before this process and its store are gone
                self._end(verdict)
                return

    def _look(self) -> Verdict | None:
        """Write this rank's line, and read those of the others."""
        self._write()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            with self._lock:
                key = f"geoaccel/{rank}"
                if not self._store.check([key]):  # it has not come so far
                    continue
                line = json.loads(self._store.get(key))
            same = line == self._seen.get(rank)
            self._unchanged[rank] = self._unchanged[rank] + 1 if same else 0
            self._seen[rank] = line
            if (verdict := self._judge(rank, line)) is not None:
                return verdict
        return None

    def _judge(self, rank: int, line: dict[str, Any]) -> Verdict | None:
        if line["is"] == FAILED:
            return Verdict(rank, line["line"], line["code"])
        who = f"rank {rank} (process {line['pid']} on {line['host']})"
        if line["is"] == DONE:
            self._left[rank] = self._left[rank] + 1 if self._waits else 0
            early = self._left[rank] > LEFT_TICKS
            return Verdict(rank, f"{who} ended while others still needed it; see its last output") if early else None
        here = line["host"] == self._host
        if here and _born(line["pid"]) != line["born"]:
            return Verdict(rank, f"{who} died; the others cannot finish without it, start all of them again")
        if not here and self._unchanged[rank] > SILENT_TICKS:
            return Verdict(rank, f"{who} does not answer; the others cannot finish without it, start all of them again")
        return None

    def _without_store(self) -> Verdict | None:
        """The store went with the process that kept it."""
        gone = [rank for rank, line in self._seen.items() if line["host"] == self._host and line["is"] == ALIVE]
        for rank in gone:
            if (verdict := self._judge(rank, self._seen[rank])) is not None:
                return verdict
        if not self._waits:  # all may be done, and the keeper of the store first
            return None
        return Verdict(0, "the store of the group is gone, and with it its process, usually rank 0")


def _born(pid: int) -> float | None:
    """When a process of this machine was started; None where it does not run, as a zombie does not."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def end_process(verdict: Verdict) -> None:
    """Print why, and exit at once: the main thread hangs in a collective that will never return."""
    print(f"geoaccel: {verdict.line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(verdict.code)


def client(store: dist.Store) -> dist.Store | None:
    """Another client of a store; None if this kind has none."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
