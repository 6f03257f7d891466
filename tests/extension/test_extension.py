"""A merging method in a package of its own: installed, and used by every command as if it were ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from references import Golden

from geoaccel.models.weights import save_model

PACKAGE = Path(__file__).parent / "geoaccel-strided"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package beside geoaccel, and another one that is broken."""
    folder = tmp_path_factory.mktemp("extension")
    source, site = folder / "source", folder / "site"
    shutil.copytree(PACKAGE, source)  # a build leaves files in it
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    info = site / "broken_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[geoaccel.merging]\nbroken = nowhere.to_be_found\n")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(Golden("vggt_tiny", "vggt").network(), path, dtype=torch.float32)
    return path


COMMANDS = """
import contextlib, io, json, sys
from geoaccel.cli import main

for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def said(
    installed: dict[str, str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands that follow one another in one process."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.jpg")
    model, size = f"model={checkpoint}", "data.options.size=[28,28]"
    evaluate = ["eval", "merging=strided", model, "data=synthetic", "data.scenes=1", "data.frames=2", size]
    evaluate += ["timing.repeats=0", "out=run"]
    photographs = ["reconstruct", "photos", "--model", str(checkpoint), "--formats", "npz", "--out", "scene"]
    lines = {
        "info": ["info"],
        "eval": [*evaluate, "merging.strided.stride=3"],
        "wrong knob": [*evaluate, "ratio=0.5"],
        "reconstruct": [*photographs, "--merging", "strided"],
        "bench": ["bench", model, "methods=strided", "frames=[2]", "size=[56,56]", "out=bench"],
    }
    run = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(list(lines.values())), capture_output=True, text=True,
        env=installed, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = dict(zip(lines, map(json.loads, run.stdout.splitlines()), strict=True))
    assert (folder / "scene" / "reconstruction.npz").is_file()
    return found


def test_a_broken_package_is_left_out_with_one_line(said: dict[str, tuple[int, str, str]]) -> None:
    warned = [line for _, _, err in said.values() for line in err.splitlines() if "broken-method" in line]
    assert warned == ["merging method 'broken' of the package broken-method is ignored: "
                      "ModuleNotFoundError: No module named 'nowhere'"]  # fmt: skip


def test_every_command_takes_it(said: dict[str, tuple[int, str, str]]) -> None:
    for name in ("info", "eval", "reconstruct", "bench"):
        assert said[name][0] == 0, said[name][2]
    row = json.loads(said["eval"][1].splitlines()[-1])
    assert (row["merging"], row["frames"], row["scenes"]) == ("strided", 2, 1)
    assert json.loads(said["bench"][1].splitlines()[-1])["merging"] == "strided"
    (line,) = (line for line in said["info"][1].splitlines() if line.startswith("merging: "))
    assert "strided (of geoaccel_strided)" in line
    assert "httm" in line
    assert "broken" not in line
    assert "rates for predicting speedups: built in (GEOACCEL_RATES=built-in)" in said["info"][1].splitlines()


def test_its_knobs_are_known(said: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = said["wrong knob"]
    known = "geoaccel: unknown knob of strided 'ratio'; known: bypass, min_gain, stride"
    assert (code, err.splitlines()[-1]) == (2, known)


def test_its_own_test(installed: dict[str, str], tmp_path: Path) -> None:
    """Also describe, and the class as an attribute of geoaccel.merging."""
    shutil.copy(PACKAGE / "test_strided.py", tmp_path)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_strided.py"]
    run = subprocess.run(line, capture_output=True, text=True, env=installed, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout


def test_without_it_nothing_is_known_of_it() -> None:
    from geoaccel.merging import MERGING

    assert "strided" not in MERGING
