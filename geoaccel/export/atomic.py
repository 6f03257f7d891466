"""Output folders that are either complete or not there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "files.json"


@contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling of `folder`, which takes its name when the block ends without an error.

    A hidden folder ending in ``.tmp`` holds the files meanwhile; an error or Ctrl-C removes it. With `overwrite` an
    earlier result stays in place until the new one is complete.

    Example:
        >>> with atomic_folder("scene") as work:
        ...     (work / "points.ply").write_bytes(data)

    Raises:
        FileExistsError: The folder holds something, and `overwrite` is not set or it is not ours to delete.
        OSError: The place cannot be written to.
    """
    folder = _resolve(folder)
    check_output_folder(folder, overwrite=overwrite)
    work = _make_sibling(folder, ".tmp")
    try:
        yield work
        files = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
        (work / MANIFEST).write_text(json.dumps({"written_by": "geoaccel", "files": files}, indent=1) + "\n")
        _replace(folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_output_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """Find out before the work starts whether a result can be written here.

    Really makes (and removes) a folder there: permissions say little, since root may write everywhere but not on a
    read-only disk. Raises what `atomic_folder` would raise.
    """
    folder = _resolve(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"the output folder {folder} is not empty; choose another one, or pass overwrite=True (--overwrite) "
                "to replace an earlier result"
            )
        _require_ours(folder)
    elif folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output folder {folder} is a file; choose another name")
    existing = next(parent for parent in folder.parents if parent.exists())
    _make_sibling(existing / folder.name, ".probe").rmdir()


def _require_ours(folder: Path) -> None:
    """Overwriting deletes the folder: refuse if anything in it was not written by an earlier run."""
    try:
        known = {MANIFEST, *json.loads((folder / MANIFEST).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known:
            raise FileExistsError(
                f"the output folder {folder} holds {name}, which no earlier result wrote and overwriting would delete; "
                "move it away, or choose another folder"
            )


def _resolve(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve()


def _make_sibling(folder: Path, suffix: str) -> Path:
    """A new empty folder on the same disk, hidden, with the permissions that any new folder gets."""
    sibling = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{suffix}"
    try:
        sibling.mkdir(parents=True)
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        reason = (error.strerror or "the system says no").lower()
        raise kind(f"cannot write to {folder.parent} ({reason}); choose another output folder") from None
    return sibling


def _replace(folder: Path, work: Path) -> None:
    """Give `work` the name `folder`; what stood there before is deleted last."""
    if not folder.exists():
        work.rename(folder)
        return
    old = _make_sibling(folder, ".old")
    old.rmdir()
    folder.rename(old)
    try:
        os.rename(work, folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
