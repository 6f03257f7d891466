"""The quick start, from top to bottom: its commands and its Python as they are written, one after the other."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent / "quick-start.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for kind, block in BLOCKS
    if not kind
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("geoaccel ")
]


def run(command: list[str], folder: Path) -> str:
    program = [sys.executable, "-m", *command] if command[0] == "geoaccel" else command
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which all commands ran, and what each printed."""
    folder = tmp_path_factory.mktemp("quick-start")
    return folder, [run(command, folder) for command in COMMANDS]


def test_every_command_does_what_the_page_says(said: tuple[Path, list[str]]) -> None:
    folder, texts = said
    assert [command[1] for command in COMMANDS] == [
        *("--version", "demo", "reconstruct", "view", "reconstruct", "reconstruct", "eval")
    ]
    for path in ("scene/points.ply", "scene/scene.glb", "scene/sparse/0", "scene/contact_sheet.png"):
        assert (folder / path).exists(), path
    assert (folder / "scene.html").read_text().startswith("<!DOCTYPE html>")
    assert re.search(r"against the dense model: .*: \d+\.\d\dx", texts[-2])  # and that something was left out
    report = next((folder / "runs" / "eval").glob("*/report.html")).read_text()
    assert "asymmetric" in report
    assert "dense" in report


def test_the_python_runs_on_the_same_photographs(said: tuple[Path, list[str]]) -> None:
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    assert "Asymmetric" in run([sys.executable, "-c", code], said[0])
    assert (said[0] / "from-python" / "points.ply").stat().st_size > 0
