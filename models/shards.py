"""Checkpoints in several safetensors files, with an index that says which tensor is in which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from geoaccel.errors import UserError
from geoaccel.fingerprint import of_bytes, of_file

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors.index.json"
PART_NAME = re.compile(r"[^/\\]+\.safetensors")
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def is_index(path: Path) -> bool:
    """Whether a file is such an index, by its name."""
    return path.name.endswith(SUFFIX)


def files_of(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it.

    Raises:
        UserError: If it is no index, or names something else.
    """
    try:
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(held.values()))
        plain = bool(names) and all(PART_NAME.fullmatch(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise UserError(f"{index} is no index of safetensors files (weight_map, tensors to file names); get it again")
    return [index.with_name(name) for name in names]


def check_files(index: Path) -> list[Path]:
    """The files of an index, all of them there.

    Raises:
        FileNotFoundError: Naming the first that is missing.
    """
    files = files_of(index)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {missing[0].name}, which is not beside it ({len(missing)} of {len(files)} files are "
            "missing); download all of them"
        )
    return files


def is_whole(index: Path) -> bool:
    """Whether all files of an index are there."""
    return all(path.is_file() for path in files_of(index))


def fetch_files(index: Path, fetch: Callable[[str], Path | None]) -> None:
    """Bring the files of an index to where it is.

    Args:
        index: The index.
        fetch: Brings a file of this name; None: there is no such file.
    """
    for path in files_of(index):
        if fetch(path.name) is None:
            raise UserError(f"{index.name} names {path.name}, which is not beside it on the hub; it is incomplete")


def fingerprint(index: Path) -> str:
    """Of all that the files hold, and how they are divided."""
    return of_bytes(*(of_file(path).encode() for path in (index, *check_files(index))))


def weights_of(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: those of an index, or the file itself."""
    return check_files(path) if is_index(path) else [path]


def hint(path: Path) -> str:
    """What to give where tensors are missing since a file is one of several, by its name."""
    found = PART.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return ""
    return (
        f"; {path.name} seems to be one of {int(found['count'])} files: give their folder, or the index "
        f"{found['stem']}{SUFFIX}"
    )
