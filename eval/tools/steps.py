"""How long commands show where they are, and how they end early."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def resumable() -> Iterator[None]:
    """Say how an interrupted command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        say("geoaccel: interrupted; what was found so far is kept, and the same command goes on from there")
        raise SystemExit(130) from None


def bar(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Steps with a bar, the time taken and the time to come."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, dynamic_ncols=True, disable=not sys.stderr.isatty()))


def say(line: str) -> None:
    """A line on stderr, above the bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
