"""One thread at a time, where a model holds what belongs to a single forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # beside the models: a lock cannot be copied
_NEW = Lock()


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Let other threads that say the same of this model wait; the thread itself may say it again inside."""
    with _NEW:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        yield
