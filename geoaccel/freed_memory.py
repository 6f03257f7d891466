"""Return freed memory to the system, which the C library would otherwise keep.

glibc keeps freed blocks between those still in use. In a long run with tensors of many sizes, this fragmentation makes
resident memory grow.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed_memory() -> None:
    """Return freed blocks; takes some milliseconds, and does nothing with a C library other than glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)
