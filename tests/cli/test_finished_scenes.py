"""``--scenes`` again: finished scenes stay, others are made, and none is taken for one of other options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)
from own_code import bring, edit
from references import Golden
from torch import nn

import geoaccel
from geoaccel import export
from geoaccel.merging import MERGING
from geoaccel.models.weights import save_model

NAMES = ("a", "b", "c")


@pytest.fixture
def tiny() -> nn.Module:
    """Of one backbone: nothing here depends on it."""
    return Golden("vggt_tiny", "vggt").network()


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path) -> list[Any]:
    """Three scenes, without ``--out``."""
    folders = [write_images(tmp_path / "photos" / name, 2 + number) for number, name in enumerate(NAMES)]
    given = ["--scenes", "--model", checkpoint, "--size", "56", "--formats", "npz,ply"]
    return ["reconstruct", *folders, *given]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every scene that is predicted."""
    found: list[int] = []
    inner = geoaccel.reconstruct

    def reconstruct(pictures: Any, **options: Any) -> Any:
        found.append(len(pictures))
        return inner(pictures, **options)

    monkeypatch.setattr(geoaccel, "reconstruct", reconstruct)
    return found


def interrupted_at(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ctrl-C while a scene of so many images is written; what it gives back ends that."""
    write = export.write_into

    def interrupt(work: Path, scene: Any, *args: Any, **kwargs: Any) -> Any:
        about = write(work, scene, *args, **kwargs)
        if len(scene) == count:
            raise KeyboardInterrupt
        return about

    monkeypatch.setattr(export, "write_into", interrupt)
    return lambda: monkeypatch.setattr(export, "write_into", write)


def test_an_interrupted_run_goes_on(
    command: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, predicted: list[int]
) -> None:
    code, _, err = run(capsys, *command, "--out", tmp_path / "whole")
    assert code == 0, err
    out = tmp_path / "out"
    resume = interrupted_at(3, monkeypatch)
    code, _, err = run(capsys, *command, "--out", out)
    assert (code, "finished scenes are kept; the same command resumes from there" in err) == (130, True), err
    assert sorted(path.name for path in out.iterdir()) == ["a"]
    resume()
    before = changed(out)
    predicted.clear()
    code, told, err = run(capsys, *command, "--out", out, "--max-memory", "20GB")
    assert code == 0, err
    assert predicted == [3, 4]
    assert "a: kept; it was finished with the same options, weights and images" in err.splitlines()
    lines = [json.loads(line) for line in told.splitlines()]
    assert lines[0] == {"out": str(out / "a"), "kept": True}
    assert [(Path(line["out"]).name, line["frames"]) for line in lines[1:]] == [("b", 3), ("c", 4)]
    assert changed(out / "a") == {name.removeprefix("a/"): when for name, when in before.items()}
    assert contents(out) == contents(tmp_path / "whole")
    code, told, err = run(capsys, *command, "--out", out, "--dry-run")
    lines = [json.loads(line) for line in told.splitlines()]
    assert (code, lines) == (0, [{"dry_run": True, "out": str(out / name), "kept": True} for name in NAMES]), err
    assert err.count("kept if the model is the same, too") == 3


def test_scenes_beside_one_with_a_bad_image_stay_where_it_is_left_out(
    command: list[Any], tmp_path: Path, capsys: Any, predicted: list[int]
) -> None:
    out, bad = tmp_path / "out", tmp_path / "photos" / "b" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:60])
    code, _, err = run(capsys, *command, "--out", out)
    assert "or leave out such images (--skip-bad, skip_bad=True)" in err
    assert (code, predicted) == (2, [2, 3, 4]), err
    code, _, err = run(capsys, *command, "--out", out, "--skip-bad")
    assert (code, predicted) == (0, [2, 3, 4, 3]), err
    assert err.count("kept; it was finished with the same options, weights and images") == 2
    refused(capsys, *command, "--out", out, says="different settings (options.skip_bad was True, is now False)")


def test_what_was_made_otherwise_is_refused(
    command: list[Any], tiny: nn.Module, tmp_path: Path, capsys: Any, predicted: list[int]
) -> None:
    out, photos = tmp_path / "out", tmp_path / "photos"
    code, _, err = run(capsys, *command[:2], *command[4:], "--out", out)
    assert code == 0, err
    before = contents(out)
    predicted.clear()
    otherwise = f"{out / 'a'} holds a finished scene made with different settings ("
    again = [*command, "--out", out]
    for options, says in (
        (["--conf-percentile", "40"], "options.conf_percentile was 30.0, is now 40.0"),
        (["--formats", "npz"], "options.formats was ['npz', 'ply'], is now ['npz']"),
        (["--size", "28"], "options.size was 56, is now 28"),
        (["--merging", "alike"], "options.merging was None, is now 'alike'"),
    ):
        refused(capsys, *again, *options, says=otherwise + says)
    with torch.no_grad():
        next(tiny.parameters()).add_(1.0)
    save_model(tiny, tmp_path / "other.safetensors", dtype=torch.float32)
    refused(capsys, *again, "--model", tmp_path / "other.safetensors", says=otherwise + "weights was")
    write_images(photos / "more", 1)
    (photos / "more" / "0.jpg").replace(photos / "a" / "new.jpg")
    refused(capsys, *again, says=otherwise + "images was")
    (photos / "a" / "new.jpg").unlink()
    (out / "a" / "points.ply").unlink()
    refused(capsys, *again, says=f"{out / 'a'} is not empty")
    assert predicted == []
    assert contents(out) == {name: held for name, held in before.items() if name != "a/points.ply"}
    code, _, err = run(capsys, *again, "--overwrite")
    assert (code, predicted) == (0, [2, 3, 4]), err
    assert {name: held for name, held in contents(out).items() if name.startswith("a/")} == before


def test_files_that_options_name_count(command: list[Any], tmp_path: Path, capsys: Any, predicted: list[int]) -> None:
    camera = tmp_path / "camera.json"
    camera.write_text(json.dumps({"fl_x": 60, "fl_y": 60, "cx": 40, "cy": 30, "w": 80, "h": 60}))
    given = [*command, "--out", tmp_path / "out", "--intrinsics", camera]
    code, _, err = run(capsys, *given)
    assert code == 0, err
    camera.write_text(camera.read_text().replace("60,", "66,", 1))
    refused(capsys, *given, says="made with different settings (options.intrinsics entry 1 was")
    assert predicted == [2, 3, 4]


def test_scenes_of_an_own_method_that_was_edited_are_refused(
    command: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, predicted: list[int]
) -> None:
    own = bring(tmp_path, "own_of_scenes", monkeypatch)
    table = tmp_path / "table"
    table.write_text("1")
    monkeypatch.setitem(MERGING._entries, "own", own.Own)
    given = [*command, "--out", tmp_path / "out", "--layers", f"{{0: {{own: {{table: {table}}}}}}}"]
    code, _, err = run(capsys, *given)
    assert code == 0, err
    table.write_text("2")
    refused(capsys, *given, says="made with different settings (files.0.asymmetric.table was")
    table.write_text("1")
    edit(own)
    refused(capsys, *given, says="made with different settings (packages.own_of_scenes was")
    assert predicted == [2, 3, 4]


def test_a_result_of_its_own_is_no_scene(command: list[Any], tmp_path: Path, capsys: Any) -> None:
    alone = [part for part in command[:2] + command[4:] if part != "--scenes"]
    code, _, err = run(capsys, *alone, "--out", tmp_path / "out" / "a")
    assert code == 0, err
    refused(capsys, *command, "--out", tmp_path / "out", says=f"{tmp_path / 'out' / 'a'} is not empty")
    refused(capsys, *alone, "--out", tmp_path / "out" / "a", says="is not empty")


@pytest.mark.parametrize("window", [[], ["--window", "4"]], ids=["one forward", "windows"])
def test_a_killed_scene_leaves_nothing_that_looks_finished(
    command: list[Any], tmp_path: Path, capsys: Any, window: list[str]
) -> None:
    if window:
        pytest.importorskip("scipy")
        for name in NAMES:
            write_images(tmp_path / "photos" / name, 6)
    killed = (
        "import os, signal, sys\n"
        "from geoaccel import cli, export\n"
        "write = export.write_into\n"
        "def die(work, *args, **kwargs):\n"
        "    about = write(work, *args, **kwargs)\n"
        "    '.b.geoaccel' in str(work) and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return about\n"
        "export.write_into = die\n"
        "raise SystemExit(cli.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    given = [str(part) for part in (*command, *window, "--formats", "ply", "--out", out)]
    process = subprocess.run(
        [sys.executable, "-c", killed, *given], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == ["a"]
    code, told, err = run(capsys, *given)
    assert code == 0, err
    assert [json.loads(line).get("kept", False) for line in told.splitlines()] == [True, False, False]
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c"]
    code, _, err = run(capsys, *given[:-1], tmp_path / "whole")
    assert code == 0, err
    assert contents(out) == contents(tmp_path / "whole")
