"""A worker: it makes what it keeps when that is first needed, and does what it is told."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from geoaccel.errors import DiskFull, MissingPackage, UserError
from geoaccel.fingerprint import PACKAGE, of_sources
from geoaccel.workers.cluster import require_ray

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""What a CPU says that has no memory left: torch has a class of its own for CUDA alone."""
Logged = tuple[str, int, str]
"""Logger, level and line."""
Answer = tuple[Any, list[Logged]]


class Worker:
    """One actor: it makes what it keeps when that is first needed, and does what it is told."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def do(self, source: tuple[Callable[..., Any], list[Any]], work: Callable[..., Any], *args: Any) -> Answer:
        """A function of what is kept, and what it logged.

        Args:
            source: What makes that, and references to its arguments.
            work: The function.
            args: After what is kept.
        """
        with _logged() as lines:
            if not self._kept:
                load, given = source
                self._kept.append(_named(lambda: load(*require_ray().get(given)), files=True))
            return _named(lambda: work(self._kept[0], *args)), lines

    def beside(self, work: Callable[..., Any], *args: Any) -> Answer:
        """A function of its arguments alone, and what it logged."""
        with _logged() as lines:
            return _named(lambda: work(*args)), lines

    def who(self) -> Answer:
        """Its machine and its code."""
        node = require_ray().get_runtime_context().get_node_id()
        return {"host": socket.gethostname(), "node": node, "code": of_sources(("",))}, []


@contextmanager
def _logged() -> Iterator[list[Logged]]:
    """Warnings of this package and this thread, as they come."""
    lines: list[Logged] = []
    handler, own = logging.Handler(logging.WARNING), threading.get_ident()

    def keep(record: logging.LogRecord) -> None:
        if record.thread == own:
            lines.append((record.name, record.levelno, record.getMessage()))

    handler.emit = keep  # type: ignore[method-assign]
    logging.getLogger(PACKAGE).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(PACKAGE).removeHandler(handler)


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


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
