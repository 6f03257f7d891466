"""What a process may still take, in control groups of both versions, from files that the test writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from geoaccel import host_memory, memory

V1 = "/sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "/sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw"


def write(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def second(limit: Any, high: Any, current: int, inactive: int = 0, place: str = "") -> dict[str, Any]:
    """Files of a group of version 2."""
    folder = f"sys/fs/cgroup{place}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": current,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7",
    }


def first(limit: int, used: int, inactive: int, place: str = "") -> dict[str, Any]:
    """Files of a group of version 1."""
    folder = f"sys/fs/cgroup/memory{place}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}",
    }


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "left"),
    [
        # A container of version 2 sees its own group as the root of all.
        (f"1 2 0:3 / {V2}", "0::/", second(1000, "max", 300, 50), 750),
        (f"1 2 0:3 / {V2}", "0::/", second(1000, 600, 300, 50), 350),
        (f"1 2 0:3 / {V2}", "0::/", second("max", "max", 300), None),
        (f"1 2 0:3 / {V2}", "0::/", second(1000, "max", 1500), 0),
        # A job of Slurm: limits stand anywhere above.
        (
            f"1 2 0:3 / {V2}",
            "0::/slurm/job_1/step_0",
            second("max", "max", 5, 0, "/slurm/job_1/step_0") | second(900, "max", 400, 0, "/slurm/job_1"),
            500,
        ),
        # Version 1 in Docker: the group of the container is mounted, and the process may be in one below it.
        (f"1 2 0:3 /docker/abc {V1}", "4:memory:/docker/abc\n0::/", first(800, 200, 100), 700),
        (
            f"1 2 0:3 /docker/abc {V1}",
            "9:cpu:/x\n4:hugetlb,memory:/docker/abc/own",
            first(800, 200, 0) | first(400, 100, 0, "/own"),
            300,
        ),
        # A group outside of what is mounted.
        (f"1 2 0:3 / {V1}", "4:memory:/../else", first(800, 200, 0), 600),
        (f"1 2 0:3 /docker/abc {V1}", "4:memory:/docker/other", first(800, 200, 0), 600),
        # Both at once, as systemd had it for a while: whichever leaves less.
        (
            f"1 2 0:3 / {V1}\n1 2 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "4:memory:/\n0::/a",
            first(800, 200, 0) | second(100, "max", 40, 0, "/unified/a"),
            60,
        ),
        # Nothing is said, or what nobody understands.
        (f"1 2 0:3 / {V2}", "0::/", {}, None),
        (f"1 2 0:3 / {V2}", "", {"sys/fs/cgroup/memory.max": "many"}, None),
        ("nothing\n\n1 - 2\n - cgroup2 x", "0", {}, None),
    ],
)
def test_what_control_groups_leave(
    tmp_path: Path, mounts: str, groups: str, files: dict[str, Any], left: int | None
) -> None:
    write(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files})
    assert host_memory.left_by_groups(tmp_path) == left


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert host_memory.left_by_groups(tmp_path) is None


def test_free_is_the_least_of_what_machine_and_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=2300)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    for left, bytes_free in ((None, 2000), (1150, 1000), (9**20, 2000)):
        monkeypatch.setattr(host_memory, "left_by_groups", lambda left=left: left)
        assert memory.free_bytes(torch.device("cpu")) == bytes_free
