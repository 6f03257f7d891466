"""Lines of the package that make a device work or wait."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(f"{ROOT / folder}/" for folder in ("geoaccel", "models", "eval"))


class Place(NamedTuple):
    """Where the package caused something."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


def running() -> Place:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(SOURCES):
            return Place(path[len(str(ROOT)) + 1 :], frame.f_code.co_qualname, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return Place("tests", "", 0)
