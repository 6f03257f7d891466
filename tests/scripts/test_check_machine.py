"""What a machine lacks is one line that names the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import check_machine


def test_this_machine_makes_environments() -> None:
    assert check_machine.lacks_environments() is None


@pytest.mark.parametrize("part", ["venv", "ensurepip"])
def test_a_python_without_environments(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = check_machine.find_spec
    monkeypatch.setattr(check_machine, "find_spec", lambda name: None if name == part else find_spec(name))
    monkeypatch.setattr(check_machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    reason = check_machine.lacks_environments()
    assert reason == f"python3 cannot make environments, it has no {part}: apt-get install python3-venv"


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine, "NEEDED", (99, 1))
    assert "needs Python 99.1 or newer, this is 3." in str(check_machine.lacks_environments())


def test_open3d_without_its_libraries_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open3d.py").write_text("raise OSError('libusb-1.0.so.0: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    (line,) = str(check_machine.lacks_open3d_libraries()).splitlines()
    assert "libusb-1.0.so.0" in line
    assert "apt-get install libusb-1.0-0" in line
