"""A test run refuses packages of another checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from one_checkout import ROOT, mixture

from staged import stage

FOLDERS = ("geoaccel", "models", "eval", "configs")


@pytest.fixture
def second_checkout(tmp_path: Path) -> Path:
    """What a second checkout has that matters here, and one test."""
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for folder in ("tests", "scripts"):
        (tmp_path / folder).mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/one_checkout.py", "tests/references.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing(): pass\n")
    return tmp_path


def run(checkout: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHONPATH"))}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)


def test_these_tests_are_of_the_checkout_that_they_import() -> None:
    assert mixture() is None


def test_a_mixture_ends_the_run_in_one_line(second_checkout: Path) -> None:
    ran = run(second_checkout, "-m", "pytest", "tests/test_nothing.py")
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert f"These tests are in {second_checkout}, but Python takes " in line
    assert f"geoaccel.models from {ROOT / 'models'}" in line
    assert f"geoaccel.eval from {ROOT / 'eval'}" in line
    assert f"geoaccel from {ROOT / 'geoaccel'}" not in line  # that one is the checkout's: a mixture
    assert "passed" not in ran.stdout


def test_another_checkout_altogether_ends_it_too(second_checkout: Path) -> None:
    ran = run(
        second_checkout, "-P", "-m", "pytest", "tests/test_nothing.py"
    )  # -P: the current folder is not on the path
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert f"geoaccel from {ROOT / 'geoaccel'}" in line


def test_packages_of_its_own_are_taken(second_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    installed = tmp_path_factory.mktemp("installed")
    stage(installed, second_checkout)
    script = "import sys; sys.path.insert(0, 'tests'); from one_checkout import mixture; print(mixture())"
    ran = run(second_checkout, "-P", "-c", script, path=installed)
    assert ran.stdout == "None\n", ran.stdout + ran.stderr
