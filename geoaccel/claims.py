"""The hidden folder in which a result is made: one process has it at a time, and what a dead one left goes.

It has one name for each output folder, and its process holds a lock on it, which the system lets go of when the process
ends, however it ends. Who finds it locked is refused; who finds it without a lock empties it and has it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from geoaccel.errors import UserError

HIDDEN = ".geoaccel.tmp"


@dataclass(frozen=True)
class _Claim:
    """A hidden folder that this process has.

    Attributes:
        path: Of the folder; it may have been renamed since.
        handle: The open folder, which carries the lock.
        made: Folders above it that were made for it, the deepest first.
    """

    path: Path
    handle: int
    made: tuple[Path, ...]

    def is_there(self) -> bool:
        """Whether the path still leads to this very folder: a result takes it away, and others may have their own."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        return False

    def clear(self) -> None:
        """Remove all that is in it."""
        for inner in self.path.iterdir() if self.is_there() else ():
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            else:
                inner.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove it, where it is still there, and let others have the place."""
        if self.is_there():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.handle)
        for folder in self.made:
            with suppress(OSError):  # not empty: the result is in it
                folder.rmdir()


# Claims of this process that no result is made in at the moment, by output folder.
_idle: dict[Path, _Claim] = {}


def resolve(folder: str | Path) -> Path:
    """An output folder as everything here knows it."""
    try:
        return Path(folder).expanduser().resolve()
    except RuntimeError as error:  # a symbolic link that leads to itself, the home of a user who is not known
        raise UserError(f"{folder}: {error}; choose another output folder") from None


def hidden_folder(folder: Path) -> Path:
    """Where a result is made: in the output folder if that exists, else beside it."""
    return folder / HIDDEN if folder.is_dir() else folder.parent / f".{folder.name}{HIDDEN}"


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Keep other processes from making a result for a folder, from before the work until it is written.

    Raises:
        FileExistsError: Another process has the place.
        OSError: It cannot be written to.
    """
    folder = resolve(folder)
    claim = _acquire(folder)
    _idle[folder] = claim
    try:
        yield
    finally:
        _idle.pop(folder, None)
        claim.release()


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """The hidden folder of a resolved output folder, empty, for one block; the one that is claimed if there is one.

    Raises:
        FileExistsError, OSError: As `claimed`.
    """
    claim = _idle.pop(folder, None)
    if claim is not None and claim.is_there():
        try:
            yield claim.path
        finally:
            claim.clear()
            _idle[folder] = claim
        return
    claim = _acquire(folder)
    try:
        yield claim.path
    finally:
        claim.release()


def _acquire(folder: Path) -> _Claim:
    path = hidden_folder(folder)
    made = tuple(above for above in path.parents if not above.exists())
    while True:
        try:
            path.mkdir(parents=True)
            new = True
        except FileExistsError:
            new = False
        except OSError as error:
            raise cannot_write(path.parent, error) from None
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # it was another's, who is done with it
        except OSError as error:
            raise cannot_write(path, error) from None
        claim = _Claim(path, handle, made)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"another run is writing to the output folder {folder} at this moment; wait until it is done, or "
                "choose another output folder"
            ) from None
        except OSError:  # a disk without locks: nobody can tell
            if not new:
                os.close(handle)
                raise FileExistsError(
                    f"{path} is there, where another run is writing or was killed; choose another output folder, or "
                    "delete it if no run is going on"
                ) from None
        if claim.is_there():
            claim.clear()
            return claim
        os.close(handle)


def cannot_write(place: Path, error: OSError) -> OSError:
    """The error of the system as one line."""
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    reason = (error.strerror or "the system says no").lower()
    return kind(f"cannot write to {place} ({reason}); choose another output folder")
