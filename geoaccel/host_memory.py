"""Host memory available to the process: what is free, within the limits of its control groups.

In a container or a Slurm job a process that exceeds the limit of its group is killed, however much is free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeAlias

Files: TypeAlias = tuple[tuple[str, ...], str, str]
# For cgroup version 2 and version 1: limits, usage, and the entry of memory.stat for inactive file pages, which the
# system reclaims before it kills.
_V2: Files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1: Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available() -> int:
    """Bytes that the process can still allocate."""
    import psutil

    free = int(psutil.virtual_memory().available)
    left = left_by_groups()
    return free if left is None else min(free, left)


def left_by_groups(root: Path = Path("/")) -> int | None:
    """Bytes left by the control groups of the process and their parents; None if none has a limit.

    Args:
        root: Root of the file system.
    """
    found = [left for folder, files in _groups(root) if (left := _left(folder, *files)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, Files]]:
    """Folders of this process's memory control groups, from its own upwards, and the names of their files."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, mark, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if not mark or len(place) < 5 or len(kind) < 3 or not kind[0].startswith("cgroup"):
            continue
        second = kind[0] == "cgroup2"
        if not second and "memory" not in kind[2].split(","):
            continue
        mount = root / place[4].lstrip("/")
        folder = mount / _inside(_own(root, second), place[3])
        while True:
            yield folder, _V2 if second else _V1
            if folder == mount:
                break
            folder = folder.parent


def _own(root: Path, second: bool) -> str:
    """Path of the group of this process."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "", "")
        if controllers == "" if second else "memory" in controllers.split(","):
            return path
    return "/"


def _inside(path: str, mounted: str) -> PurePosixPath:
    """The path of a group relative to a mounted group; the mounted group itself if it is not below it."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return PurePosixPath()
    return own.relative_to(mounted)


def _left(folder: Path, limits: tuple[str, ...], used: str, files: str) -> int | None:
    """Bytes left by one group; None if it has no limit or cannot be read."""
    most = [limit for name in limits if (limit := _number(_text(folder / name))) is not None]
    taken = _number(_text(folder / used))
    if not most or taken is None:
        return None
    stat = re.search(rf"^{files} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, min(most) - taken + (int(stat[1]) if stat else 0))


def _number(text: str) -> int | None:
    """The number in a file; None for ``max``, or if there is none."""
    return int(text) if text.strip().isdecimal() else None


def _text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
