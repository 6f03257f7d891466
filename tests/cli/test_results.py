"""Where results go: what is there already is kept, what is interrupted leaves nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)

import geoaccel
from geoaccel import cli
from geoaccel.export import atomic_folder, check_output_folder
from geoaccel.models.weights import save_model
from geoaccel.testing import tiny_network


def test_bad_outputs(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/geoaccel"):
        refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="output")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not run."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(geoaccel, "reconstruct", fail)


@pytest.mark.parametrize("what", ["folder", "result", "file", "pattern", "link", "video", "masks", "model"])
def test_overwriting_spares_what_is_read(checkpoint: Path, tmp_path: Path, capsys: Any, idle: None, what: str) -> None:
    """All of it came from an earlier run, which is why only the place can tell that it is needed."""
    out, photos, masks, model = tmp_path / "scene", write_images(tmp_path / "photos"), tmp_path / "masks", checkpoint
    with atomic_folder(out) as work:
        write_images(work / "images")
        write_images(work / "masks")
        (work / "clip.mp4").touch()
        (work / "model.safetensors").write_bytes(checkpoint.read_bytes())
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    given: list[Path] = {
        "folder": [out / "images"],
        "result": [out],
        "file": [photos / "0.jpg", out / "images" / "1.jpg"],
        "pattern": [out / "images" / "*.jpg"],
        "link": [tmp_path / "links"],
        "video": [out / "cl*.mp4"],
    }.get(what, [photos])
    (tmp_path / "links").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "links" / name).symlink_to(out / "images" / name)
    masks = out / "masks" if what == "masks" else masks
    model = out if what == "model" else model
    args = ("--model", model, "--overwrite", *(["--masks", masks] if what == "masks" else []))
    refused(capsys, "reconstruct", *given, "--out", out, *args, says="which lies in the output folder")
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before


def test_a_model_that_is_read_is_spared_by_the_demo(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    with atomic_folder(tmp_path / "demo") as work:
        (work / "model.safetensors").write_bytes(checkpoint.read_bytes())
    args = ("--model", tmp_path / "demo" / "model.safetensors", "--overwrite")
    refused(capsys, "demo", "--out", tmp_path / "demo", *args, says="which lies in the output folder")


def test_hub_ids_are_no_files_of_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output_folder(".", overwrite=True, needed=[Path("facebook/VGGT-1B")])
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook" / "VGGT-1B").touch()
    with pytest.raises(FileExistsError, match="which lies in"):
        check_output_folder(".", overwrite=True, needed=[Path("facebook/VGGT-1B")])


def test_the_working_folder_as_output(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos")
    (tmp_path / "scene").mkdir()
    monkeypatch.chdir(tmp_path / "scene")
    args = ("reconstruct", photos, "--out", ".", "--model", checkpoint, "--formats", "nerfstudio")
    for more in ([], ["--overwrite"]):
        code, _, err = run(capsys, *args, *more)
        assert code == 0, err
        assert "wrote transforms.json" in err
    document = json.loads(Path("transforms.json").read_text())
    assert [frame["file_path"] for frame in document["frames"]] == [f"images/{index}.jpg" for index in range(3)]


def test_home_folders(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave ``--out=~/scene`` as it is."""
    photos = write_images(tmp_path / "photos")
    write_images(tmp_path / "masks")
    monkeypatch.setenv("HOME", str(tmp_path))
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "npz")
    code, _, err = run(capsys, *args, "--out=~/scene", "--masks=~/masks")
    assert code == 0, err
    assert f"wrote {tmp_path / 'scene' / 'reconstruction.npz'}" in err
    refused(capsys, *args, "--out=~nobody-of-this-name/scene", says="unknown user")
    code, stdout, err = run(capsys, "demo", "--out=~/demo", "--frames", 2, "--merging", "none", "--model", checkpoint)
    assert code == 0, err
    assert f"reconstruct {tmp_path / 'demo' / 'photos'} --model {checkpoint} --out scene" in stdout
    assert not (tmp_path / "demo" / "comparison.png").exists()


def test_names_that_are_not_utf8(checkpoint: Path, tmp_path: Path, capsys: Any, idle: None) -> None:
    photos = write_images(tmp_path / "photos")
    try:
        os.rename(photos / "1.jpg", os.fsencode(photos) + b"/foto_\xe4.jpg")
    except OSError:
        pytest.skip("this disk only has names in UTF-8")
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint)
    refused(capsys, *args, says=r"image foto_\xe4.jpg is not UTF-8, which colmap needs; rename the file")
    code, _, err = run(capsys, *args, "--formats", "ply,glb,npz")
    assert (code, "the model was run" in err) == (1, True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["reconstruct", "a", "--out", "b"], "nothing was left behind"),
        (["demo"], "nothing was left behind"),
        (["info"], "nothing was left behind"),
        (["eval"], "predictions of finished scenes are kept; the same command resumes from there"),
        (["bench"], "timings of this run are lost"),
        (["tune", "a", "--model", "b", "--out", "c.yaml"], "earlier results are kept"),
    ],
)
def test_what_an_interruption_leaves(
    command: list[str], says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    for name in ("run_reconstruct", "run_demo", "run_info", "run_measurement", "run_tune"):
        monkeypatch.setattr(cli, name, interrupt)
    code, _, err = run(capsys, *command)
    assert (code, err.startswith(f"geoaccel: interrupted; {says}")) == (130, True), err


@pytest.mark.skipif(os.name != "posix", reason="pipes of Unix")
def test_a_reader_that_went_away() -> None:
    """Little is written, which waits in the buffer until the end."""
    code = (
        "import sys, geoaccel.cli as cli\n"
        "cli.run_info = lambda args: (sys.stdin.readline(), print('line'))\n"
        "raise SystemExit(cli.main(['info']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, err) == (141, "")


def test_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while files are written: no output folder, no temporary folder."""
    slow = (
        "import time, geoaccel.export as e\n"
        "def hang(r, c, folder):\n"
        "    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(30)\n"
        "assert 'ply' in e.FORMATS\n"
        "e.FORMATS._entries['ply'] = hang\n"
        "from geoaccel.cli import main\n"
        "raise SystemExit(main(['reconstruct', 'photos', '--out', 'scene', '--formats', 'ply']))\n"
    )
    write_images(tmp_path / "photos")
    process = subprocess.Popen(
        [sys.executable, "-c", slow], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    while "writing" not in (line := process.stdout.readline()):
        assert line, "the command ended early"
    process.terminate()
    assert process.wait(timeout=20) == 143
    time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_conditions_and_the_unit_reach_the_files(tmp_path: Path, capsys: Any) -> None:
    network = tiny_network("pi3x")
    save_model(network, tmp_path / "pi3x.safetensors", dtype=torch.float32)
    photos, depths = write_images(tmp_path / "photos", 2), tmp_path / "depths"
    depths.mkdir()
    np.save(depths / "1.npy", np.full((60, 80), 2.0, np.float32))
    found = {}
    for name, given in (("plain", ()), ("told", ("--intrinsics", 70, "--depths", depths))):
        options = ("--out", tmp_path / name, "--model", tmp_path / "pi3x.safetensors", "--formats", "npz")
        code, _, err = run(capsys, "reconstruct", photos, *options, *given)
        assert code == 0, err
        assert "unit: about a metre" in err
        with np.load(tmp_path / name / "reconstruction.npz") as arrays:
            found[name] = arrays["depth"]
            assert str(arrays["unit"]) == "about a metre"
    assert not np.array_equal(found["plain"], found["told"])
