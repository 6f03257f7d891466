"""What commands have in common: lines for people, folders and names as a shell gives them."""

from __future__ import annotations

import sys
from pathlib import Path

from geoaccel.errors import UserError


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def split_names(text: str | None) -> list[str]:
    """Comma-separated names; ``none`` is no name."""
    return [name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none")]


def expand(path: str) -> Path:
    """With the home folder for ``~``: a shell leaves it as it is in ``--out=~/scene``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names the home folder of a user who is not known here; write it out") from None
