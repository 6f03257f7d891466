"""``reconstruct --window``: a sequence to files, and one line for what does not work with windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geoaccel.cli import main, parser
from geoaccel.errors import UserError
from geoaccel.options.names import USUAL_FORMATS, WINDOW_FORMATS
from geoaccel.windows.run import DEFAULT_FORMATS
from geoaccel.windows_command import check_windows


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "photos"
    folder.mkdir()
    wide = np.random.default_rng(1).integers(0, 255, (56, 90, 3), np.uint8)
    for i in range(9):
        Image.fromarray(wide[:, 3 * i : 3 * i + 56]).save(folder / f"{i}.png")
    return folder


def test_what_is_usual_with_windows_and_without() -> None:
    found = []
    for more in ([], ["--window", "5"], ["--window", "5", "--reference", "first", "--formats", "tum"]):
        args = parser().parse_args(["reconstruct", "a", "--out", "b", *more])
        check_windows(args)
        found.append((args.formats, args.reference))
    assert found == [(USUAL_FORMATS, "first"), (WINDOW_FORMATS, "auto"), ("tum", "first")]
    assert ",".join(DEFAULT_FORMATS) == WINDOW_FORMATS


def test_every_option_reaches_the_windows(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def run(*_: Any, **options: Any) -> None:
        given.update(options)
        raise UserError("enough")

    monkeypatch.setattr("geoaccel.windows_command.run_windows", run)
    options = ["--no-loops", "--reference", "first", "--window", "6", "--overlap", "2", "--edge-filter", "0.2"]
    options += ["--max-memory", "1GB", "--conf-percentile", "10", "--max-points", "99", "--images", "copy"]
    assert main(["reconstruct", str(photographs), "--out", str(tmp_path / "out"), "--size", "28", *options]) == 2
    wanted = {"loops": False, "reference": "first", "window": 6, "overlap": 2, "edge_filter": 0.2, "size": 28}
    wanted |= {"max_memory": "1GB", "conf_percentile": 10, "max_points": 99, "images": "copy"}
    assert {name: given[name] for name in wanted} == wanted


def test_a_folder_in_windows(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    given = ["reconstruct", str(photographs), "--out", str(out), "--size", "28", "--window", "5", "--overlap", "2"]
    assert main([*given, "--formats", "tum,ply"]) == 0
    said, told = capsys.readouterr()
    summary = json.loads(said)
    assert (summary["frames"], summary["windows"], summary["window"], summary["overlap"]) == (9, 3, 5, 2)
    assert "9 frames in 3 windows of 5, 2 shared" in told
    assert (out / "windows.json").exists()
    assert main(given) == 2
    assert "not empty" in capsys.readouterr().err


def test_dry_run_says_how_long_windows_are(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["reconstruct", str(photographs), "--out", str(tmp_path / "out"), "--size", "28", "--dry-run"]
    assert main([*given, "--window", "5"]) == 0
    assert "in windows of 5" in capsys.readouterr().err
    assert main([*given, "--window", "12"]) == 2
    assert "longer than the sequence of 9 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlap", "4"], "--overlap applies only to windows"),
        (["--no-loops"], "--loops applies only to windows"),
        (["--window", "6", "--compare", "dense", "--merging", "httm"], "--compare does not work with windows yet"),
        (["--window", "6", "--formats", USUAL_FORMATS], "png does not work with --window"),
        (["--window", "2"], "from 4 on"),
        (["--window", "6", "--overlap", "6"], "at most 5"),
        (["--window", "12"], "longer than the sequence of 9 frames"),
        (["--window", "6", "--refine", "ba"], "--refine does not work with windows yet"),
        (["--window", "6", "--drop-outliers"], "--drop-outliers does not work with windows yet"),
        (["--window", "6", "--shared-camera"], "--shared-camera does not work with windows yet"),
        (["--window", "6", "--intrinsics", "100"], "--intrinsics does not work with windows yet"),
        (["--window", "6", "--points", "head"], "--points head does not work with windows"),
        (["--window", "6", "--tracks", "measure"], "--tracks measure does not work with windows"),
        (["--window", "6", "--images", "none"], "--images none does not work with windows"),
        (["--window", "6", "--reference", "3"], "every window chooses its own"),
        (["--window", "6", "--formats", "npz"], "npz does not work with --window"),
    ],
)
def test_what_is_not_for_windows_is_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    given = ["reconstruct", str(photographs), "--out", str(tmp_path / "out"), "--size", "28", *options]
    assert main(given) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert not (tmp_path / "out").exists()
