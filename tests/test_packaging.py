"""What ships, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

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
