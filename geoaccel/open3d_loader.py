"""Open3D, imported late: it is optional, heavy, and fails in several ways if system libraries are missing."""

from __future__ import annotations

from types import ModuleType

from geoaccel.errors import MissingPackage

HINT = (
    "pip install geoaccel[eval] (or geoaccel[mesh]); on Debian or Ubuntu also: "
    "apt-get install libusb-1.0-0 libgl1 libegl1 libx11-6"
)


def load_open3d() -> ModuleType:
    """Import Open3D.

    Raises:
        MissingPackage: With one line that names the packages to install.
    """
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingPackage(f"Open3D cannot be imported ({reason}). {HINT}") from error
    return open3d
