"""Memory that was freed goes back to the system, where the C library would keep it.

glibc keeps freed pieces between those that are still used. In a long run, of tensors of many sizes, resident memory
grows by that though nothing more is held.
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
    """Hand freed pieces back; takes some milliseconds, and does nothing where the C library is not glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)
