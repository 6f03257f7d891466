"""Checks a machine: one line names the package to install for what is missing.

``python scripts/check_machine.py`` before an environment is made; it exits with 1 if none can be made.
``python scripts/check_machine.py open3d`` inside one: a warning if Open3D is installed but cannot be loaded.
It uses only the standard library, and only syntax that an old Python can parse.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

NEEDED = (3, 11)


def lacks_environments() -> str | None:
    """Why no environment can be made with this Python, or None."""
    wanted, version = f"{NEEDED[0]}.{NEEDED[1]}", f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < NEEDED:
        return f"geoaccel needs Python {wanted} or newer, this is {version}: make PYTHON=python{wanted} ..."
    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if missing:
        name = os.path.basename(sys.executable or "python3")
        package = f"apt-get install {name}-venv" if shutil.which("apt-get") else f"install them for {name}"
        return f"{name} cannot make environments, it has no {' and no '.join(missing)}: {package}"
    return None


def lacks_open3d_libraries() -> str | None:
    """Why an installed Open3D does not load, or None; the tests that compare with it are skipped then."""
    if find_spec("open3d") is None:
        return None
    from geoaccel.errors import MissingPackage
    from geoaccel.open3d_loader import load_open3d

    try:
        load_open3d()
    except MissingPackage as error:
        return str(error)
    return None


if __name__ == "__main__":
    if sys.argv[1:] == ["open3d"]:
        reason = lacks_open3d_libraries()
        if reason:
            print(reason, file=sys.stderr)
    else:
        sys.exit(lacks_environments())
