"""Run a tool on the package tree as installed: ``python scripts/staged.py mypy -p geoaccel``.

``models``, ``eval`` and ``configs`` are at the root and install as ``geoaccel.models`` and so on. A tool that does not
read that mapping from ``pyproject.toml``, such as a type checker, sees ``Any`` wherever one of them calls another. Here
it runs in a folder of links laid out as installed. The paths that it prints are translated back to the files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("scripts", *(f"scripts/{name}" for name in ("training", "figures", "gpu_day")))
"""On the path of a script that imports its neighbour."""


def package_folders(root: Path = ROOT) -> dict[str, str]:
    """Folder of each package that is not where its name says, from ``pyproject.toml``."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return dict(project["tool"]["setuptools"]["package-dir"])


def stage(destination: Path, root: Path = ROOT) -> None:
    """Create the tree as installed in a folder: packages are folders, everything in them is a link to the checkout."""
    for package, folder in sorted(package_folders(root).items()):
        staged = destination.joinpath(*package.split("."))
        staged.mkdir(parents=True)
        for entry in (root / folder).iterdir():
            (staged / entry.name).symlink_to(entry)
    for name in ("scripts", "pyproject.toml"):
        (destination / name).symlink_to(root / name)


def real_paths(line: str, root: Path = ROOT) -> str:
    """A line of a tool's output with staged paths as they are in the checkout: geoaccel/eval/x.py is eval/x.py."""
    moved = {package.replace(".", "/"): folder for package, folder in package_folders(root).items()}
    for staged, folder in sorted(moved.items(), reverse=True):  # the longer first
        line, found = re.subn(rf"^{re.escape(staged)}/", f"{folder}/", line)
        if found:
            break
    return line


def run(command: list[str], root: Path = ROOT) -> int:
    """Run a command of this environment in the staged tree and print what it prints; returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="geoaccel-staged-") as folder:
        stage(Path(folder), root)
        path = os.pathsep.join((folder, *(str(Path(folder, name)) for name in SCRIPTS)))
        environment = {**os.environ, "MYPYPATH": path, "MYPY_CACHE_DIR": str(root / ".mypy_cache"), "STAGED": folder}
        tool = [sys.executable, "-m", *command]
        process = subprocess.Popen(tool, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for line in process.stdout:
            print(real_paths(line, root), end="", flush=True)
        return process.wait()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python scripts/staged.py MODULE [ARGUMENT ...], for example: mypy -p geoaccel")
    sys.exit(run(sys.argv[1:]))
