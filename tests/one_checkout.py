"""Tests, package and subpackages come from one checkout: an environment of another one gives a mixture."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def mixture(root: Path = ROOT) -> str | None:
    """One line that says which packages come from elsewhere than these tests, and what to do; None where none does."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    elsewhere = []
    parent = find("geoaccel", None)
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        spec = find(package, parent.submodule_search_locations) if parent and package != "geoaccel" else parent
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != root / folder:
            elsewhere.append(f"{package} from {found or 'nowhere'}")
    if not elsewhere:
        return None
    taken = ", ".join(elsewhere)
    return f"These tests are in {root}, but Python takes {taken}: use the environment that make test makes here"


def find(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """What an import would load. `importlib.util.find_spec` would import the parent of a subpackage for it."""
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
