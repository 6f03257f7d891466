"""Output files and folders that are either complete or not there, and the check that a file can be written."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from geoaccel.errors import UserError

MANIFEST = "files.json"
_HIDDEN = re.compile(r"\.geoaccel-[0-9a-f]{8}\.\w+")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name when the block ends without an error.

    Until then an earlier file stays as it is; after an error nothing is left. What a killed process leaves ends in
    ``.tmp``.

    Example:
        >>> with atomic_file("points.ply") as temporary:
        ...     temporary.write_bytes(data)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file that is either complete or not there."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a file that is either complete or not there, as UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[None]:
    """Write a safetensors file, which takes its name when the block ends without an error.

    The block is for a last look whether the file may be written. A file has the permissions of any new file:
    safetensors alone makes files that nobody else may read.

    Raises:
        SafetensorError: The file cannot be written.
        OSError: Likewise.
    """
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(mode)
        yield


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is either complete or not there; see `atomic_tensors`."""
    with atomic_tensors(path, tensors, metadata):
        pass


@contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder, whose content becomes that of `folder` when the block ends without an error.

    A new folder appears at once: the temporary one beside it takes its name. A folder that exists stays the same one,
    since it may be a mount point, or where a shell stands: the temporary one is inside, and what it holds moves up when
    it is complete, `MANIFEST` last, so that a folder without one is not a result. With `overwrite` an earlier result
    stays in place until then; its own manifest goes first. Temporary folders are hidden; an error or Ctrl-C removes
    them and puts an earlier result back.

    Example:
        >>> with atomic_folder("scene") as work:
        ...     (work / "points.ply").write_bytes(data)

    Raises:
        FileExistsError: The folder holds something, and `overwrite` is not set or it is not ours to delete.
        OSError: The place cannot be written to.
    """
    folder = _resolve(folder)
    check_output_folder(folder, overwrite=overwrite)
    token = secrets.token_hex(4)
    if folder.is_dir():
        work = _make_hidden(folder, f".geoaccel-{token}.tmp")
    else:
        work = _make_hidden(folder.parent, f".{folder.name}.{token}.tmp")
    try:
        yield work
        files = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
        (work / MANIFEST).write_text(json.dumps({"written_by": "geoaccel", "files": files}, indent=1) + "\n")
        if work.parent == folder:
            _require_free(folder, overwrite=overwrite, besides=work)
            _move_up(folder, work)
        else:
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def final_folder(work: Path) -> Path:
    """The folder in which the files of a temporary one will be; relative paths in them start from it."""
    return work.parent if _HIDDEN.fullmatch(work.name) else work


def check_output_folder(folder: str | Path, *, overwrite: bool = False, needed: Iterable[Path] = ()) -> None:
    """Find out before the work starts whether a result can be written here.

    Really makes (and removes) a folder and a file there: permissions say little, since root may write everywhere but
    not on a read-only disk, and a full disk still makes folders. Raises what `atomic_folder` would raise.

    Args:
        folder: Where the result will be.
        overwrite: An earlier result will be replaced.
        needed: Files and folders that the run reads; overwriting must not delete them.
    """
    folder = _resolve(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output folder {folder} is a file; choose another name")
    if overwrite:
        _require_outside(folder, needed)
    _require_free(folder, overwrite=overwrite)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    probe = _make_hidden(existing, f".geoaccel-{secrets.token_hex(4)}.probe")
    try:
        (probe / "probe").write_bytes(bytes(4096))
    except OSError as error:
        raise _cannot_write(existing, error) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _require_outside(folder: Path, needed: Iterable[Path]) -> None:
    """Overwriting deletes what is in the folder, be it the file itself or a link to it."""
    for path in needed:
        for place in (path.resolve(), path.parent.resolve() / path.name):
            if place.is_relative_to(folder) and os.path.lexists(place):  # what does not exist may be a hub id
                raise FileExistsError(
                    f"this run reads {path}, which lies in the output folder {folder} and overwriting would delete; "
                    "choose another output folder, or move it away"
                )


def _require_free(folder: Path, *, overwrite: bool, besides: Path | None = None) -> None:
    """The folder holds nothing, or, with `overwrite`, nothing but an earlier result."""
    found = sorted(path for path in folder.iterdir() if path != besides) if folder.is_dir() else []
    for path in found:
        if _HIDDEN.fullmatch(path.name):
            raise FileExistsError(
                f"the output folder {folder} holds {path.name}, where another run is writing or was killed; "
                "choose another folder, or delete it if no run is going on"
            )
    if found and not overwrite:
        raise FileExistsError(
            f"the output folder {folder} is not empty; choose another one, or pass overwrite=True (--overwrite) "
            "to replace an earlier result"
        )
    _require_ours(folder, found)


def _require_ours(folder: Path, found: Iterable[Path]) -> None:
    """Overwriting deletes what was found: refuse if anything in it was not written by an earlier run."""
    try:
        known = {MANIFEST, *json.loads((folder / MANIFEST).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    for path in sorted(inner for entry in found for inner in (entry, *entry.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known:
            raise FileExistsError(
                f"the output folder {folder} holds {name}, which no earlier result wrote and overwriting would delete; "
                "move it away, or choose another folder"
            )


def check_output_file(out: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """The path of a file that is to come, once it is known that it can be written.

    Raises:
        ValueError: If it is no name for a new file.
        OSError: If nothing can be written beside it.
    """
    path = Path(out).expanduser()
    if path.suffix != suffix:
        raise UserError(f"output file {out} must be named {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for the output file")
    if path.is_dir():
        raise UserError(f"output file {out} is a folder; name a file, in it or elsewhere")
    if path.exists() and not overwrite:
        raise UserError(f"output file {out} exists; choose another, or overwrite it (--overwrite)")
    _probe(path)
    return path


def _probe(path: Path) -> None:
    """Write a small file beside one that is to come, and remove it: permissions say little, and disks are full.

    Raises:
        OSError: In one line.
    """
    attempt = path.with_name(f".{path.name}.{secrets.token_hex(4)}.probe")
    try:
        try:
            attempt.write_bytes(bytes(4096))
        finally:
            attempt.unlink(missing_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot write to {path.parent} ({reason}); choose another output file, or make room") from None


def _resolve(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve()


def _make_hidden(parent: Path, name: str) -> Path:
    """A new empty folder with the permissions that any new folder gets."""
    try:
        (parent / name).mkdir(parents=True)
    except OSError as error:
        raise _cannot_write(parent, error) from None
    return parent / name


def _cannot_write(place: Path, error: OSError) -> OSError:
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    reason = (error.strerror or "the system says no").lower()
    return kind(f"cannot write to {place} ({reason}); choose another output folder")


def _move_up(folder: Path, work: Path) -> None:
    """Replace what `folder` holds by what `work`, inside it, does; what was there before is deleted last."""
    old = _make_hidden(folder, work.with_suffix(".old").name)
    before = sorted((path for path in folder.iterdir() if path not in (work, old)), key=_manifest_last)
    moves = [(path, old / path.name) for path in reversed(before)]
    moves += [(path, folder / path.name) for path in sorted(work.iterdir(), key=_manifest_last)]
    try:
        for source, target in moves:
            os.rename(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if not os.path.lexists(source):  # it was moved
                os.rename(target, source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest_last(path: Path) -> tuple[bool, str]:
    return path.name == MANIFEST, path.name
