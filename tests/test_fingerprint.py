"""Fingerprints: of files by what they hold, of sources by those that matter, and what differs in one line."""

from __future__ import annotations

import ast
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from own_code import bring
from safetensors.torch import save_file

from geoaccel import fingerprint
from geoaccel.eval.run import made_by
from geoaccel.merging import MERGING
from geoaccel.quantization import QUANTIZATION

NETWORKS = fingerprint.sources(("",), fingerprint.NOT_OF_NETWORKS)
PREDICTION = {**NETWORKS, **fingerprint.sources(made_by.PREDICTION)}
# Reached from the code that predicts, and of no consequence for what it predicts.
WITHOUT_CONSEQUENCE = {
    *("atomic", "bfloat16", "fingerprint", "memory", "version", "runtime"),
    *("export", "reconstruction", "point_cloud", "quantized_file", "scene", "sharding", "outliers", "workers"),
    *("eval.run.made_by", "eval", "eval.run", "eval.metrics"),
    # what trajectories are scored by, once they are predicted
    *("eval.metrics.pieces", "eval.metrics.odometry", "eval.metrics.pose", "eval.metrics.trajectories"),
}


def reached(name: str, every: dict[str, Path], seen: set[str]) -> set[str]:
    """Modules that a module imports, and those that they import."""
    if name in seen or name not in every:
        return seen
    seen.add(name)
    for node in ast.walk(ast.parse(every[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for target in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                reached(target.removeprefix("geoaccel").removeprefix("."), every, seen)
        if isinstance(node, ast.Import):
            for alias in node.names:
                reached(alias.name.removeprefix("geoaccel").removeprefix("."), every, seen)
    parent = name.rpartition(".")[0]
    return reached(parent, every, seen) if parent else seen


def test_all_that_predicts_is_in_the_fingerprint() -> None:
    every = fingerprint.sources(("",))
    found = reached("eval.run.job", every, set())
    assert len(found) > 60
    others = {name for name in found - PREDICTION.keys() if not name.startswith(("export.", "sharding.", "workers."))}
    sequences = fingerprint.sources(made_by.SEQUENCES).keys()
    assert others - sequences <= WITHOUT_CONSEQUENCE


@pytest.mark.parametrize("registry", [MERGING, QUANTIZATION], ids=["merging", "quantization"])
def test_every_method_is_in_the_fingerprint(registry) -> None:
    for _, method in registry.items():
        assert method.__module__.removeprefix("geoaccel.") in NETWORKS, method


def test_what_shows_results_is_not_in_the_fingerprint() -> None:
    for name in ("eval.report.page", "cli", "export.glb", "eval.metrics.pose"):
        assert name in fingerprint.sources(("",))
        assert name not in PREDICTION
    assert "eval.metrics.pose" in fingerprint.sources(made_by.SCORES)
    assert "eval.bench.speed" in fingerprint.sources(made_by.TIMING)
    assert made_by.code(made_by.SCORES) != made_by.code(made_by.TIMING) != made_by.code() == made_by.code()


def test_sources_are_read_once() -> None:
    made_by.code()
    began = time.perf_counter()
    for _ in range(100):
        made_by.code()
    assert time.perf_counter() - began < 0.1


def test_code_that_others_bring_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("from theirs.method import Method")
    (tmp_path / "theirs" / "method.py").write_text("class Method: ...")
    monkeypatch.syspath_prepend(tmp_path)
    from theirs import Method

    before = fingerprint.of_others([Method, MERGING["httm"]])
    assert before.keys() == {"theirs"}
    (tmp_path / "theirs" / "method.py").write_text("class Method: x = 1")
    assert fingerprint.of_others([Method]) == before  # the process runs what it read
    fingerprint._of_package.cache_clear()
    assert fingerprint.of_others([Method]) != before


def test_modules_that_others_import_count_where_no_other_distribution_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "own.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("own_first\nown_later\n")
    for name in ("own_later", "own_beside", "own_unused"):
        (tmp_path / f"{name}.py").write_text("def use():\n  import own_first, own_absent\n")
    source = "import numpy, own_beside\nclass Own:\n  def use(self):\n    from own_later import use"
    own, known, read, inner = bring(tmp_path, "own_first", monkeypatch, source), [], list[str](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or inner(path))
    for name in ("", "own_first", "own_later", "own_beside", "own_unused"):
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("\n")
        fingerprint._of_package.cache_clear()
        known.append(fingerprint.of_others([own.Own]))
    assert [one != other for one, other in pairwise(known)] == [True, True, True, False]
    assert set(read) == {"own_first.py", "own_later.py", "own_beside.py"}  # and nothing of numpy


def test_a_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    before = fingerprint.of_file(path)
    save_file({"a": torch.ones(2)}, path)
    os.utime(path, (1, 1))  # clocks of file systems tick slowly
    assert fingerprint.of_file(path) != before
    assert len(before) == len(fingerprint.of_bytes(b"")) == fingerprint.LENGTH


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        ({"a": 1}, {"a": 2}, "a was 1, is now 2"),
        ({}, {"a": 2}, "a was None, is now 2"),
        (None, {"a": 2}, "a was None, is now 2"),
        ({"data": {"x": 1, "y": [2]}}, {"data": {"x": 1, "y": [3]}}, "data.y was [2], is now [3]"),
        ({"a": ["x" * 40] * 4}, {"a": ["x" * 40] * 3}, "a had 4 entries, has 3 now"),
        ({"a": [*["x" * 40] * 4, "y"]}, {"a": [*["x" * 40] * 4, "z"]}, "a entry 4 was 'y', is now 'z'"),
    ],
)
def test_what_differs_is_said_in_one_line(before, now, said) -> None:
    assert fingerprint.difference(before, now) == said
