"""A module of another package, as somebody who uses geoaccel brings it, and edits it between two runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from geoaccel import fingerprint

METHOD = """
from dataclasses import dataclass

from geoaccel.merging import Asymmetric

@dataclass(frozen=True)
class Own(Asymmetric):
    table: str = "none"
"""


def bring(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, source: str = METHOD) -> ModuleType:
    """Write a module into a folder and import it."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    fingerprint._of_package.cache_clear()
    return importlib.import_module(name)


def edit(module: ModuleType) -> None:
    """Change its source; what is read once in a process is forgotten, as if another one began."""
    path = Path(str(module.__file__))
    path.write_text(f"{path.read_text()}\nCHANGED = True\n")
    fingerprint._of_package.cache_clear()
