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
    """The files named in an index, in the same folder.

    Raises:
        UserError: If it is not an index, or names anything else.
    """
    try:
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(held.values()))
        plain = bool(names) and all(PART_NAME.fullmatch(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise UserError(f"{index} is not an index of safetensors files (weight_map: tensor to file); download it again")
    return [index.with_name(name) for name in names]


def check_files(index: Path) -> list[Path]:
    """The files of an index, if all exist.

    Raises:
        FileNotFoundError: Naming the first missing one.
    """
    files = files_of(index)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} lists {missing[0].name}, which is not in its folder ({len(missing)} of {len(files)} files are "
            "missing); download all of them"
        )
    return files


def is_whole(index: Path) -> bool:
    """Whether all files of an index are there."""
    return all(path.is_file() for path in files_of(index))


def fetch_files(index: Path, fetch: Callable[[str], Path | None]) -> None:
    """Fetch the files of an index into its folder.

    Args:
        index: The index.
        fetch: Fetches a file by name; returns None if there is no such file.
    """
    for path in files_of(index):
        if fetch(path.name) is None:
            raise UserError(f"{index.name} lists {path.name}, which the hub repository lacks; it is incomplete")


def fingerprint(index: Path) -> str:
    """Fingerprint of the contents of all files, and of how the tensors are divided among them."""
    return of_bytes(*(of_file(path).encode() for path in (index, *check_files(index))))


def weights_of(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: those of an index, or the file itself."""
    return check_files(path) if is_index(path) else [path]


def hint(path: Path) -> str:
    """A hint when tensors are missing because the file, judging by its name, is one of several."""
    found = PART.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return ""
    return (
        f"; {path.name} seems to be one of {int(found['count'])} files: give their folder, or the index "
        f"{found['stem']}{SUFFIX}"
    )
