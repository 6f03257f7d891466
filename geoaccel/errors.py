"""Errors that the user can put right, and how a program ends: with one line for these, with a traceback for our own."""

from __future__ import annotations

import io
import os
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable


class UserError(ValueError):
    """The input is wrong; the message is one line that says what was given, what is allowed, what to do.

    Raised where input is checked, and only there: options, settings, knobs, files, images, and numbers that depend on
    them. A function that was called with tensors that do not fit each other raises a plain ``ValueError``: no input of
    a command may lead to it. What cannot be unless this package is wrong is an ``assert``.
    """


class UserTypeError(UserError, TypeError):
    """The input is of a wrong type."""


class DiskFull(OSError):
    """There is no room for a file; the message names it."""


class UnsupportedHere(UserError, NotImplementedError):
    """Something that does not run on this device; the message says why, and what does."""


class MissingPackage(ImportError):
    """An optional package cannot be imported; the message says what needs it and how to get it."""


USER_ERRORS = (UserError, OSError, MissingPackage)
"""Raised for what a user can put right, the files and folders that are not there or cannot be written included.
Everything else is our fault and shows a traceback."""

ARRAY_ERRORS = (OSError, EOFError, ValueError, TypeError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on a file that is cut off, damaged, or none of its own."""

REPORT = (
    "this is an error of geoaccel, or of a package under it; please report it in the project's issue tracker with the "
    "command, the traceback above and the output of `geoaccel info`"
)


def run_program(name: str, work: Callable[[], object], *, interrupted: str = "nothing was left behind") -> int:
    """Run a command of ours and return its exit code, after a word on stderr where it failed.

    ==== =====================================================================================================
    0    done
    2    the input is wrong (:data:`USER_ERRORS`): one line; ``GEOACCEL_TRACEBACK=1`` in the environment raises it
    1    anything else: the traceback, and one line that says how to report it
    130  interrupted (Ctrl-C)
    141  nobody reads the output any more, as in ``geoaccel info | head -1``
    ==== =====================================================================================================

    Args:
        name: Of the program, in front of the line.
        work: What it does.
        interrupted: What Ctrl-C leaves.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: files may be named by any bytes
    try:
        work()
        sys.stdout.flush()  # a reader that went away shows now, and not while the interpreter shuts down
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what is still in the buffers goes nowhere
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        return 141
    except USER_ERRORS as error:
        if os.environ.get("GEOACCEL_TRACEBACK"):
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print(f"{name}: {REPORT}", file=sys.stderr)
        return 1
    return 0
