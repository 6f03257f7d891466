"""Several pictures are worked on at a time, and what comes out is in order, as if one came after another.

Decoding and resizing leave Python's lock, so threads are enough. Pillow's draft mode, which decodes a JPEG at a half of
its size or less, would halve the time of 12 megapixels and is not used: at a network input of 518 x 392 it moves values
by up to 6 of 255 in enlarged photographs and by up to 19 at drawn edges, and even at 126 x 98 by 5, where colours are
stored at half resolution.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

MOST_THREADS = 8
AHEAD = 2
"""Results for each thread that may wait for their turn."""

PIXELS_AT_ONCE = 100_000_000
"""Of all pictures that are decoded at a time, at full size; one that is larger is decoded alone."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    *,
    in_threads: Callable[[Item], bool] = lambda item: True,
    threads: int | None = None,
) -> Generator[Result, None, None]:
    """What `work` makes of each item, in their order, made a few items ahead.

    What an item raises is raised when it is its turn, so the first bad one in order is the one that is heard of. What
    has not begun by then is never begun.

    Args:
        items: Any number; they are asked for as they are needed.
        work: Is called from several threads.
        in_threads: Whether an item may be worked on beside others; else it is when it is its turn, in the thread that
            asks for it.
        threads: How many; one for each core by default, at most `MOST_THREADS`.
    """
    threads = threads or min(MOST_THREADS, usable_cores())
    rest, waiting = iter(items), deque[Callable[[], Result]]()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="geoaccel-images")

    def begin(item: Item) -> Callable[[], Result]:
        if not in_threads(item):
            return lambda: work(item)
        future: Future[Result] = pool.submit(work, item)
        return future.result

    try:
        waiting.extend(begin(item) for item in islice(rest, threads * AHEAD))
        while waiting:
            yield waiting.popleft()()
            waiting.extend(begin(item) for item in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)


class Room:
    """So many of something at a time, whoever holds them.

    Args:
        size: How many there are. Who wants more waits until nobody holds any.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken, self._changed = 0, threading.Condition()

    @contextmanager
    def held(self, count: int) -> Iterator[None]:
        """Wait until there is room for `count`, and hold it while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + count <= self.size)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()
