"""A merging method in a package of its own: installed, and used by every command as if it were ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from references import Golden

from geoaccel.models import build
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
    import torch

    golden = Golden("vggt_tiny")
    model = build("vggt", **golden.config)
    model.load_state_dict(golden.weights)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(model.eval(), path, dtype=torch.float32)
    return path


def command(environment: dict[str, str], folder: Path, *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr without the one line on the broken package."""
    line = [sys.executable, "-m", "geoaccel.cli", *map(str, args)]
    run = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    lines = run.stderr.splitlines()
    warned = [line for line in lines if "broken-method" in line]
    assert warned == ["merging method 'broken' of the package broken-method is left out: "
                      "ModuleNotFoundError: No module named 'nowhere'"]  # fmt: skip
    return run.returncode, run.stdout, "\n".join(line for line in lines if line not in warned)


def test_eval(installed: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    tiny = (f"model={checkpoint}", "data=synthetic", "data.scenes=1", "data.frames=2", "timing.repeats=0", "out=run")
    code, out, err = command(installed, tmp_path, "eval", "merging=strided", "merging.strided.stride=3", *tiny)
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])
    assert (row["merging"], row["frames"], row["scenes"]) == ("strided", 2, 1)
    code, _, err = command(installed, tmp_path, "eval", "merging=strided", "ratio=0.5", *tiny)
    assert (code, err.splitlines()[-1]) == (
        2,
        "geoaccel: unknown knob of strided 'ratio'; known: bypass, stride",
    )


def test_reconstruct(installed: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.jpg")
    args = ("--model", checkpoint, "--merging", "strided", "--formats", "npz", "--out", "scene")
    code, _, err = command(installed, tmp_path, "reconstruct", "photos", *args)
    assert code == 0, err
    assert (tmp_path / "scene" / "reconstruction.npz").is_file()


def test_bench(installed: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    small = ("frames=[2]", "size=[56,56]", "out=run")
    code, out, err = command(installed, tmp_path, "bench", f"model={checkpoint}", "methods=strided", *small)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["merging"] == "strided"


def test_info(installed: dict[str, str], tmp_path: Path) -> None:
    code, out, _ = command(installed, tmp_path, "info")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("merging: "))
    assert "strided (of geoaccel_strided)" in line
    assert "httm" in line
    assert "broken" not in line


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


def test_the_document_shows_this_package() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
    for name in ("pyproject.toml", "geoaccel_strided.py", "test_strided.py"):
        assert (PACKAGE / name).read_text().strip() in text, f"docs/extending.md shows another {name}"
