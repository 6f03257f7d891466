"""Tools see the tree as it installs: a wrong call from one package into another is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from staged import ROOT, package_folders, real_paths, stage

PLANTED = """
from geoaccel.eval.metrics.pose import auc

auc("x", "y", 3, nonsense=4)
"""


def test_every_package_is_where_its_name_says(tmp_path: Path) -> None:
    stage(tmp_path)
    assert len(package_folders()) > 1
    for package, folder in package_folders().items():
        staged = tmp_path.joinpath(*package.split("."))
        sources = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        assert sources
        assert all((staged / source).samefile(ROOT / folder / source) for source in sources)


def test_a_planted_wrong_call_across_packages_is_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    stage(tmp_path)
    (tmp_path / "geoaccel" / "planted.py").write_text(PLANTED)
    modules = ["-m", "geoaccel.planted", "-m", "geoaccel.eval.metrics.pose"]  # those two: all of torch takes minutes
    mypy = [sys.executable, "-m", "mypy", "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}", *modules]
    ran = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert 'geoaccel/planted.py:4: error: Unexpected keyword argument "nonsense" for "auc"' in ran.stdout


@pytest.mark.parametrize(
    ("printed", "real"),
    [
        ("geoaccel/eval/metrics/pose.py:12: error: no", "eval/metrics/pose.py:12: error: no"),
        ("geoaccel/models/vggt.py:1: error: in geoaccel/models/x", "models/vggt.py:1: error: in geoaccel/models/x"),
        ("geoaccel/plan.py:3: note: so", "geoaccel/plan.py:3: note: so"),
        ("geoaccel/evaluated.py:3: note: so", "geoaccel/evaluated.py:3: note: so"),
        ("Success: no issues found", "Success: no issues found"),
    ],
)
def test_paths_are_those_of_the_files(printed: str, real: str) -> None:
    assert real_paths(printed) == real
