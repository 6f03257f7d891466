"""Memory of this machine that the process may still take: what is free, and what its control groups leave it.

In a container or a job of Slurm a process that takes more than its group may is killed, however much the machine has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeAlias

Files: TypeAlias = tuple[tuple[str, ...], str, str]
# Of a group of version 2 and of version 1: limits, what is in use, and the entry of memory.stat for files in it that
# nobody has read for long, which the system takes back before it kills.
_V2: Files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1: Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available() -> int:
    """Bytes that the process can still get."""
    import psutil

    free = int(psutil.virtual_memory().available)
    left = left_by_groups()
    return free if left is None else min(free, left)


def left_by_groups(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of the process and those above them leave; None where none says a limit.

    Args:
        root: Of the file system.
    """
    found = [left for folder, files in _groups(root) if (left := _left(folder, *files)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, Files]]:
    """Folders of the groups of this process that count memory, from its own up, and the names of their files."""
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
    """A group as seen from where a group is mounted, that one itself where it does not lie in it."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return PurePosixPath()
    return own.relative_to(mounted)


def _left(folder: Path, limits: tuple[str, ...], used: str, files: str) -> int | None:
    """Bytes that one group leaves; None where it has no limit or does not say."""
    most = [limit for name in limits if (limit := _number(_text(folder / name))) is not None]
    taken = _number(_text(folder / used))
    if not most or taken is None:
        return None
    stat = re.search(rf"^{files} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, min(most) - taken + (int(stat[1]) if stat else 0))


def _number(text: str) -> int | None:
    """Of a file that holds one; None for ``max``, or where there is none."""
    return int(text) if text.strip().isdecimal() else None


def _text(path: Path) -> str:
    """Of a file; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
