"""What commands have in common: lines and bars for people, folders and names as a shell gives them."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geoaccel.errors import UserError

_said = {"quiet": False}
_collected: list[list[tuple[bool, str]]] = []


def set_verbosity(*, quiet: bool = False, verbose: bool = False) -> None:
    """How much a program says: ``quiet`` leaves warnings, errors and results; ``verbose`` adds what is logged."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose were given; give one of them")
    _said["quiet"] = quiet
    logging.getLogger("geoaccel").setLevel(logging.INFO if verbose else logging.NOTSET)


def say(line: str) -> None:
    """A line for people, on stderr, above a bar that is being drawn; not where a program is to be quiet."""
    if _collected:
        _collected[-1].append((False, line))
    elif not _said["quiet"]:
        warn(line)


def warn(line: str) -> None:
    """A line on stderr that is never left out."""
    if _collected:
        _collected[-1].append((True, line))
    elif "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """A result as one line of JSON on stdout; numbers that JSON does not have, such as NaN, become null."""
    print(json.dumps(_finite(document), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def collected() -> Iterator[list[tuple[bool, str]]]:
    """Keep the lines of a block for another process to `repeat`: whether each is never left out, and the line."""
    _collected.append([])
    try:
        yield _collected[-1]
    finally:
        _collected.pop()


def repeat(lines: Iterable[tuple[bool, str]]) -> None:
    """Say what was `collected`."""
    for always, line in lines:
        (warn if always else say)(line)


def is_quiet() -> bool:
    """Whether results, warnings and errors are all that is to be said."""
    return _said["quiet"]


def shows_progress() -> bool:
    """Whether somebody looks at a bar."""
    return sys.stderr.isatty() and not _said["quiet"]


def bar(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Steps with a bar, the time taken and the time to come."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, dynamic_ncols=True, disable=not shows_progress()))


def counted(total: int | None, unit: str, *, shown: bool = True, **more: Any) -> Any:
    """A bar that its owner moves, drawn in logs, too; nowhere if it is not to be shown."""
    from tqdm import tqdm

    hidden = is_quiet() or not shown
    return tqdm(total=total, unit=unit, dynamic_ncols=True, file=sys.stderr, disable=hidden, **more)


def split_names(text: str | None) -> list[str]:
    """Comma-separated names; ``none`` is no name."""
    return [name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none")]


def expand(path: str) -> Path:
    """With the home folder for ``~``: a shell leaves it as it is in ``--out=~/scene``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names the home folder of a user who is not known here; write it out") from None
