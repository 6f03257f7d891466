"""Work that is interrupted at a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Stop(Exception):
    """An interruption."""


class Interrupted:
    """Stands in for the progress bar of a long piece of work, and raises after so many steps over all its stages.

    Args:
        after: Steps that are done.
        error: What it raises; ``KeyboardInterrupt`` is a user who presses Ctrl-C.
    """

    def __init__(self, after: int, error: type[BaseException] = Stop) -> None:
        self.left = after
        self.error = error

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for item in items:
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield item
