"""Errors that the user can fix, and how a program ends: one line for these, a traceback for bugs of ours."""

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

    Raised only where input is checked: options, settings, knobs, files, images, and numbers that depend on them. A
    function called with tensors that do not fit each other raises a plain ``ValueError``, which no input of a command
    may cause. Bugs of this package are an ``assert``.
    """


class UserTypeError(UserError, TypeError):
    """The input has the wrong type."""


class DiskFull(OSError):
    """The disk is full; the message names the file."""


class UnsupportedHere(UserError, NotImplementedError):
    """Something does not run on this device; the message says why, and what does."""


class MissingPackage(ImportError):
    """An optional package cannot be imported; the message says what needs it and how to install it."""


USER_ERRORS = (UserError, OSError, MissingPackage)
"""Errors that the user can fix, including missing or unwritable files and folders. Everything else is a bug of ours
and shows a traceback."""

ARRAY_ERRORS = (OSError, EOFError, ValueError, TypeError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on a file that is cut off, damaged, or none of its own."""

REPORT = (
    "this is a bug in geoaccel or in a package it uses; please report it in the project's issue tracker with the "
    "command, the traceback above and the output of `geoaccel info`"
)


def run_program(name: str, work: Callable[[], object], *, interrupted: str = "nothing was left behind") -> int:
    """Run a command and return its exit code, with a message on stderr if it failed.

    ==== =====================================================================================================
    0    done
    2    the input is wrong (:data:`USER_ERRORS`): one line; ``GEOACCEL_TRACEBACK=1`` in the environment raises it
    1    anything else: the traceback, and one line that says how to report it
    130  interrupted (Ctrl-C)
    141  nobody reads the output any more, as in ``geoaccel info | head -1``
    ==== =====================================================================================================

    Args:
        name: Name of the program, which starts the message.
        work: The command itself.
        interrupted: What Ctrl-C leaves behind, for the message.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: files may be named by any bytes
    try:
        work()
        sys.stdout.flush()  # a closed pipe shows now, and not while the interpreter shuts down
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # discards what is still in the buffers
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
