"""``reconstruct --engine ray``: what does not go together is one line, before a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, write_images

from geoaccel import ray_command, reconstruct_command
from geoaccel.cli import parser
from geoaccel.options.names import ENGINE
from geoaccel.ray_command import NAMED, _absolute
from geoaccel.workers import ENGINES


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(reconstruct_command, "load", loaded)
    monkeypatch.setattr(ray_command, "load", loaded)
    return [write_images(tmp_path / "a"), write_images(tmp_path / "b")]


def test_engines_are_those_of_the_package() -> None:
    assert tuple(ENGINE) == ENGINES


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "rey"], "ray"),
        (["--ray-address", "auto", "--scenes"], "applies to engine ray; add --engine ray"),
        (["--engine", "ray"], "add --window auto for one long sequence or --scenes for several inputs"),
        (["--engine", "ray", "--scenes", "--dry-run"], "--dry-run looks at this machine only"),
        (["--engine", "ray", "--scenes", "--device", "cuda:1"], "Ray gives every worker its own GPU"),
        (["--engine", "ray", "--scenes", "--ray-address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--engine", "ray", "--window", "5", "--refine", "ba"], "--refine does not work with windows yet"),
        (["--engine", "ray", "--scenes", "--formats", "gbl"], "Did you mean 'glb'"),
    ],
)
def test_bad_input(scenes: list[Path], tmp_path: Path, capsys: Any, options: list[str], says: str) -> None:
    pytest.importorskip("ray")
    refused(capsys, "reconstruct", *scenes, "--out", tmp_path / "out", *options, says=says)
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_gone_is_not_waited_for(
    scenes: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what auto stands for
    given = ["--out", tmp_path / "out", "--scenes", "--engine", "ray", "--ray-address", "auto"]
    refused(capsys, "reconstruct", *scenes, *given, says="no Ray cluster at auto, which is 127.0.0.1:1 (")


def test_ray_is_not_installed(scenes: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ["--out", tmp_path / "out", "--scenes", "--engine", "ray"]
    refused(capsys, "reconstruct", *scenes, *given, says="pip install 'geoaccel[ray]'")


def test_torchrun_and_ray(scenes: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    given = ["--out", tmp_path / "out", "--scenes", "--engine", "ray"]
    refused(capsys, "reconstruct", *scenes, *given, says="leave out torchrun, or --engine ray")


def test_files_are_named_for_a_process_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "mine.pt").touch()
    monkeypatch.chdir(tmp_path)
    args = parser().parse_args(
        ["reconstruct", "a", "--out", "b", "--masks", "masks", "--model", "mine.pt", "--intrinsics", "440"]
    )
    found = _absolute(args)
    assert (found.masks, found.model, found.intrinsics) == (str(tmp_path / "masks"), str(tmp_path / "mine.pt"), "440")
    assert not hasattr(found, "run")
    assert all(hasattr(args, name) for name in NAMED)
    assert _absolute(parser().parse_args(["reconstruct", "a", "--out", "b"])).model == "vggt-mini"
