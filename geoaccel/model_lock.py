"""A lock for each model, held while its slots are filled for a single forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # not in the models: a lock cannot be copied
_NEW = Lock()


@contextmanager
def locked(model: nn.Module) -> Iterator[None]:
    """Hold the lock of a model: other threads wait; the lock is reentrant."""
    with _NEW:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        yield
