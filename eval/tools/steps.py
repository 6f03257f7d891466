"""Interruption of long commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geoaccel.console import warn


@contextmanager
def resumable() -> Iterator[None]:
    """Say how to resume an interrupted command."""
    try:
        yield
    except KeyboardInterrupt:
        warn("geoaccel: interrupted; what was found so far is kept, and the same command goes on from there")
        raise SystemExit(130) from None
