"""What ships, and what importing it costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import geoaccel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEAN = """
import sys, torch
before = torch.get_rng_state()
import geoaccel, geoaccel.models, geoaccel.reconstruction
heavy = ("hydra", "open3d", "matplotlib", "torchao", "triton", "transformers", "scipy", "trimesh", "PIL", "av", "ray")
same = torch.equal(before, torch.get_rng_state())
print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized(), same)
"""


def test_the_list_of_packages_is_the_tree() -> None:
    folders = {
        "geoaccel": "geoaccel",
        "models": "geoaccel.models",
        "eval": "geoaccel.eval",
        "configs": "geoaccel.configs",
    }
    tree = set()
    for folder, package in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            tree.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    assert tree == set(PROJECT["tool"]["setuptools"]["packages"])


def test_nothing_ships_at_top_level_but_geoaccel() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert all(name.partition(".")[0] == "geoaccel" for name in packages)


def test_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == geoaccel.__version__


def test_import_is_lean() -> None:
    run = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[] False True"


def test_importing_the_folders_by_their_bare_names_fails_loudly() -> None:
    for name in ("models", "eval"):
        run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT)
        assert f"installs as geoaccel.{name}" in run.stderr


def test_public_names_exist() -> None:
    assert all(hasattr(geoaccel, name) for name in geoaccel.__all__)


def test_the_lock_holds_every_requirement() -> None:
    pinned: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            pinned.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [Requirement(text) for text in chain(PROJECT["project"]["dependencies"], *extras)]
    for requirement in wanted:
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is not in constraints.txt: make lock"
        assert all(version in requirement.specifier for version in versions), f"{requirement}: make lock"


def test_the_lock_installs_anywhere() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    assert "://" not in lock  # no index of one machine
    assert "--" not in lock
    assert "+" not in "".join(line for line in lock.splitlines() if "==" in line)  # no build of one kind of machine


@pytest.mark.slow
def test_the_wheel_is_built_without_warnings_and_holds_what_it_needs(tmp_path: Path) -> None:
    """Of a copy of what is tracked: a build leaves files behind."""
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).exists():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "copy" / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "."]
    done = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path / "copy", check=True)
    assert "is absent from the `packages` configuration" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 25e6  # of which 23.4 MB are the two checkpoints
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".png")]
    for name in (
        "models/checkpoints/vggt-mini.safetensors",
        "viewer/assets/painter.js",
        "configs/data/dtu.yaml",
        "py.typed",
    ):
        assert f"geoaccel/{name}" in names
