"""``files.json`` of an output folder lists the files of a result; all others belong to the user."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "files.json"
UNFINISHED = ".geoaccel.windows"
"""Name of a folder with the windows of an unfinished run, in an output folder or, with its name as prefix, next to
it."""


def files_in(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def written_files(folder: Path) -> frozenset[str]:
    """The files that an earlier result wrote into a folder, as relative paths; empty without a result."""
    try:
        return frozenset([MANIFEST, *json.loads((folder / MANIFEST).read_text())["files"]])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def staying(folder: Path, inputs: Iterable[Path]) -> frozenset[str]:
    """Folders in an output folder that hold inputs of a result and stay as they are, such as a project's ``images``.

    Files of an earlier result are not included.
    """
    written = {name.partition("/")[0] for name in written_files(folder)}
    found = set()
    for path in inputs:
        place = path.parent.resolve() / path.name
        if place.is_relative_to(folder) and len(parts := place.relative_to(folder).parts) > 1:
            found.add(parts[0])
    return frozenset(found - written)
