"""Progress bars of long work, as two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Shown = tuple[Callable[[int], None], Callable[..., None]]
"""Says how many are done, and what stands behind the bar."""


@contextmanager
def bar_of(progress: bool, total: int, name: str, unit: str) -> Iterator[Shown]:
    """A progress bar; where none is wanted, functions that do nothing."""
    if not progress:
        yield lambda done: None, lambda **said: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=unit) as bar:
        yield lambda done: _to(bar, done), lambda **said: bar.set_postfix(said)


def _to(bar: Any, done: int) -> None:
    bar.update(done - bar.n)
