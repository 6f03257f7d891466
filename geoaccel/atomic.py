"""Atomic output files and folders (complete or not there), and checks that they can be written."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from geoaccel.claims import HIDDEN, cannot_write, hold, resolve
from geoaccel.errors import DiskFull, UserError
from geoaccel.manifest import MANIFEST, UNFINISHED, files_in, staying, written_files

_OLD = ".geoaccel.old"  # an earlier result, while the new one takes its place
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM = 2**20  # bytes; some libraries report only that a file was not written


@contextmanager
def disk_full_names(path: Path) -> Iterator[None]:
    """Name the file in errors of a full disk: the system's own error often names none.

    Raises:
        DiskFull: In one line, in place of an error caused by a full disk or a quota.
    """
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if error.errno not in _FULL and not (error.errno is None and _no_room(path.parent)):
            raise
        raise _unwritable(path, error, kind=DiskFull) from error


def _unwritable(path: Path, error: Exception, kind: type[OSError] = OSError) -> OSError:
    """A system error, or one wrapped in the message of a library, as one line."""
    numbers = [getattr(error, "errno", None), *map(int, re.findall(r"os error (\d+)", str(error)))]
    kind = DiskFull if any(number in _FULL for number in numbers) else kind
    reason = (getattr(error, "strerror", None) or " ".join(str(error).split()) or "it is full").lower()
    return kind(f"cannot write {path} ({reason}); free some space, or choose another place")


def _no_room(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _NO_ROOM
    except OSError:
        return False


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it when the block ends without an error.

    Until then an earlier file is untouched; after an error nothing is left. Leftovers of a killed process end in
    ``.tmp``. The file is flushed to disk before it is renamed, so that a power failure leaves none half-written.

    Example:
        >>> with atomic_file("points.ply") as temporary:
        ...     temporary.write_bytes(data)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with disk_full_names(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems cannot
                raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file that is either complete or not there."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a file that is either complete or not there, as UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[None]:
    """Write a safetensors file, renamed to its final name when the block ends without an error.

    The block is for a last check whether the file may be written. The file gets the usual permissions of new files:
    safetensors alone makes files that only their owner can read.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
            temporary.chmod(mode)
        except (SafetensorError, OSError) as error:
            raise _unwritable(Path(path), error) from error
        yield


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is either complete or not there; see `atomic_tensors`."""
    with atomic_tensors(path, tensors, metadata):
        pass


@contextmanager
def atomic_folder(
    folder: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    about: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Fill a temporary folder, whose contents move to `folder` when the block ends without an error.

    A new folder appears at once: the temporary one next to it is renamed. An existing folder is kept, since it may be a
    mount point or a shell's working directory: the temporary one is inside, and its contents move up when complete,
    `MANIFEST` last, so that a folder without one is not a result. With `overwrite` an earlier result stays in place
    until then; its own manifest goes first. Temporary folders are hidden (`geoaccel.claims`); an error or Ctrl-C
    removes them and puts an earlier result back; the next run here removes the leftovers of a killed process.

    Example:
        >>> with atomic_folder("scene") as work:
        ...     (work / "points.ply").write_bytes(data)

    Args:
        folder: The output folder.
        overwrite: Replace an earlier result.
        inputs: Photographs and masks that the result is made from; folders in `folder` that hold them stay, as
            `staying` says.
        about: Further entries of the manifest, read when the block has ended.

    Raises:
        FileExistsError: The folder is not empty, and `overwrite` is not set or its contents are not an earlier result.
        OSError: The folder cannot be written to.
    """
    folder, inputs = resolve(folder), list(inputs)
    check_output_folder(folder, overwrite=overwrite, inputs=inputs)
    with hold(folder) as work, disk_full_names(folder):
        yield work
        document = {"written_by": "geoaccel", **(about or {}), "files": files_in(work)}
        (work / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
        if work.parent == folder:
            stay = staying(folder, inputs)
            _require_free(folder, overwrite=overwrite, stay=stay)
            _move_up(folder, work, stay)
        else:
            _appear(work, folder)


def _appear(work: Path, folder: Path) -> None:
    """Rename a result to its folder, which did not exist at the start."""
    try:
        work.rename(folder)
    except OSError as error:
        if os.path.lexists(folder):
            raise FileExistsError(
                f"the output folder {folder} was created by another program meanwhile, and this result is lost; choose "
                "another output folder, or pass overwrite=True (--overwrite) to replace an earlier result"
            ) from None
        raise cannot_write(folder.parent, error) from None


def final_folder(work: Path) -> Path:
    """The final folder of the files in a temporary one; relative paths in them start from it."""
    return work.parent if work.name == HIDDEN else work


def check_output_folder(
    folder: str | Path, *, overwrite: bool = False, needed: Iterable[Path] = (), inputs: Iterable[Path] = ()
) -> None:
    """Check before the work starts whether a result can be written here.

    Creates (and removes) a folder and a file there: permissions say little, since root may write everywhere but not on
    a read-only disk, and a full disk still allows folders. Raises what `atomic_folder` would raise.

    Args:
        folder: Where the result will be.
        overwrite: Replace an earlier result.
        needed: Files and folders that the run reads; overwriting must not delete them.
        inputs: Photographs and masks that it reads; the same, but folders that hold them may stay (`staying`).
    """
    folder, inputs = resolve(folder), list(inputs)
    stay = staying(folder, inputs)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output folder {folder} is a file; choose another name")
    if overwrite:
        _require_outside(folder, [*needed, *inputs], stay)
    with hold(folder) as work:
        _require_free(folder, overwrite=overwrite, stay=stay)
        try:
            (work / "probe").write_bytes(bytes(4096))
        except OSError as error:
            raise cannot_write(folder if folder.is_dir() else folder.parent, error) from None


def _require_outside(folder: Path, needed: Iterable[Path], stay: frozenset[str]) -> None:
    """Refuse inputs in the output folder, files or links: overwriting would delete them."""
    for path in needed:
        for place in (path.resolve(), path.parent.resolve() / path.name):
            inside = place.is_relative_to(folder) and place.relative_to(folder).parts[:1] not in [(s,) for s in stay]
            if inside and os.path.lexists(place):  # what does not exist may be a hub id
                raise FileExistsError(
                    f"this run reads {path}, which lies in the output folder {folder} and overwriting would delete; "
                    "choose another output folder, or move it away"
                )


def _require_free(folder: Path, *, overwrite: bool, stay: frozenset[str]) -> None:
    """Refuse a folder with anything but what stays and, with `overwrite`, an earlier result."""
    old = folder / _OLD
    if (folder / MANIFEST).exists():  # it goes first and comes last: a run was killed before it began, or was done
        shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        raise FileExistsError(
            f"the output folder {folder} contains {_OLD}, an earlier result that a run was replacing when it was "
            f"killed; choose another folder, or move what you need out of {_OLD} and delete it"
        )
    entries = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path for path in entries if path.name not in (HIDDEN, UNFINISHED, *stay))
    if found and not overwrite:
        raise FileExistsError(
            f"the output folder {folder} is not empty; choose another one, or pass overwrite=True (--overwrite) "
            "to replace an earlier result"
        )
    _require_ours(folder, found)


def _require_ours(folder: Path, found: Iterable[Path]) -> None:
    """Refuse if anything found was not written by an earlier run: overwriting would delete it."""
    known = written_files(folder)
    for path in sorted(inner for entry in found for inner in (entry, *entry.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known:
            raise FileExistsError(
                f"the output folder {folder} contains {name}, which no earlier run wrote; overwriting would delete it: "
                "move it away, or choose another folder"
            )


def check_output_file(out: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """The path of an output file, after a check that it can be written.

    Raises:
        ValueError: If the name cannot be used for a new file.
        OSError: If its folder cannot be written to.
    """
    path = Path(out).expanduser()
    if path.suffix != suffix:
        raise UserError(f"output file {out} must end in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} of the output file does not exist; create it, or choose another")
    if path.is_dir():
        raise UserError(f"output file {out} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise UserError(f"output file {out} exists; choose another name, or overwrite it (--overwrite)")
    _probe(path)
    return path


def _probe(path: Path) -> None:
    """Write a small file next to the output file, and remove it: permissions say little, and disks may be full.

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
        raise OSError(f"cannot write to {path.parent} ({reason}); choose another file, or free some space") from None


def _move_up(folder: Path, work: Path, stay: frozenset[str]) -> None:
    """Replace the contents of `folder`, except what stays, by those of `work` inside it; old files are deleted last."""
    require_no_clash(folder, stay, (path.name for path in work.iterdir()))
    old = folder / _OLD
    try:
        old.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from None
    spared = (work.name, old.name, UNFINISHED, *stay)
    before = sorted((path for path in folder.iterdir() if path.name not in spared), key=_manifest_last)
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


def require_no_clash(folder: Path, stay: frozenset[str], names: Iterable[str]) -> None:
    """Refuse a result with a file or folder, by name, where a folder stays in its output folder."""
    if clash := sorted(stay & set(names)):
        raise FileExistsError(
            f"{folder / clash[0]} holds inputs of this run, and the result would write its own {clash[0]}; "
            "choose another output folder"
        )


def _manifest_last(path: Path) -> tuple[bool, str]:
    return path.name == MANIFEST, path.name
