"""The hidden folder in which a result is made: locked by one process at a time, and cleared after a killed one.

Its name follows from the output folder. The process holds a lock on it, which the system releases however the process
ends. Another process that finds it locked is refused; one that finds it unlocked empties it and takes it over.
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
    """A hidden folder locked by this process.

    Attributes:
        path: Its path; it may have been renamed since.
        handle: The open folder, which carries the lock.
        made: Parent folders that were created for it, deepest first.
    """

    path: Path
    handle: int
    made: tuple[Path, ...]

    def is_there(self) -> bool:
        """Whether the path still leads to this folder: a finished result renames it, and others may create theirs."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        return False

    def clear(self) -> None:
        """Remove its contents."""
        for inner in self.path.iterdir() if self.is_there() else ():
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            else:
                inner.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove it if it is still there, and release the lock."""
        if self.is_there():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.handle)
        for folder in self.made:
            with suppress(OSError):  # not empty: the result is in it
                folder.rmdir()


# Claims of this process that are not in use at the moment, by output folder.
_idle: dict[Path, _Claim] = {}


def resolve(folder: str | Path) -> Path:
    """The resolved path of an output folder."""
    try:
        return Path(folder).expanduser().resolve()
    except RuntimeError as error:  # a symbolic link to itself, or the home folder of an unknown user
        raise UserError(f"{folder}: {error}; choose another output folder") from None


def hidden_folder(folder: Path) -> Path:
    """Where a result is made: in the output folder if that exists, else next to it."""
    return folder / HIDDEN if folder.is_dir() else folder.parent / f".{folder.name}{HIDDEN}"


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Lock an output folder against other processes, from before the work until the result is written.

    Raises:
        FileExistsError: Another process holds it.
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
    """The empty hidden folder of a resolved output folder, for one block; the claimed one if there is one.

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
            continue  # it belonged to another process, which has finished
        except OSError as error:
            raise cannot_write(path, error) from None
        claim = _Claim(path, handle, made)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"another run is writing to the output folder {folder}; wait until it is done, or "
                "choose another output folder"
            ) from None
        except OSError:  # a file system without locks
            if not new:
                os.close(handle)
                raise FileExistsError(
                    f"{path} exists: another run is using it or was killed; choose another output folder, or delete it "
                    "if no other run is active"
                ) from None
        if claim.is_there():
            claim.clear()
            return claim
        os.close(handle)


def cannot_write(place: Path, error: OSError) -> OSError:
    """The error of the system as one line."""
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    reason = (error.strerror or "refused by the system").lower()
    return kind(f"cannot write to {place} ({reason}); choose another output folder")
