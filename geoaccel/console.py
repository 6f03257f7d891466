"""Shared by all commands: messages, progress bars, and names and folders given in a shell."""

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
    """Set the verbosity: ``quiet`` shows only warnings, errors and results; ``verbose`` adds log messages."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose were both given; give one of them")
    _said["quiet"] = quiet
    logging.getLogger("geoaccel").setLevel(logging.INFO if verbose else logging.NOTSET)


def say(line: str) -> None:
    """Print a line on stderr, above any progress bar; not in quiet mode."""
    if _collected:
        _collected[-1].append((False, line))
    elif not _said["quiet"]:
        warn(line)


def warn(line: str) -> None:
    """Print a line on stderr, also in quiet mode."""
    if _collected:
        _collected[-1].append((True, line))
    elif "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON on stdout; numbers without a JSON form, such as NaN, become null."""
    print(json.dumps(_finite(document), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def collected() -> Iterator[list[tuple[bool, str]]]:
    """Collect the lines of a block for another process to `repeat`: whether each is a warning, and its text."""
    _collected.append([])
    try:
        yield _collected[-1]
    finally:
        _collected.pop()


def repeat(lines: Iterable[tuple[bool, str]]) -> None:
    """Print the lines `collected`."""
    for always, line in lines:
        (warn if always else say)(line)


def is_quiet() -> bool:
    """Whether only results, warnings and errors are shown."""
    return _said["quiet"]


def shows_progress() -> bool:
    """Whether to show progress bars."""
    return sys.stderr.isatty() and not _said["quiet"]


def bar(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Iterate with a progress bar, elapsed and remaining time."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, dynamic_ncols=True, disable=not shows_progress()))


def counted(total: int | None, unit: str, *, shown: bool = True, **more: Any) -> Any:
    """A progress bar advanced by the caller, shown in logs, too; hidden unless `shown`."""
    from tqdm import tqdm

    hidden = is_quiet() or not shown
    return tqdm(total=total, unit=unit, dynamic_ncols=True, file=sys.stderr, disable=hidden, **more)


def split_names(text: str | None) -> list[str]:
    """Split comma-separated names; ``none`` gives no names."""
    return [name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none")]


def expand(path: str) -> Path:
    """Expand ``~`` to the home folder: shells do not expand it in ``--out=~/scene``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names the home folder of an unknown user; write out the path") from None
