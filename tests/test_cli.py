"""The command line as a user meets it: results, exit codes, one line for what is wrong."""

from __future__ import annotations

import argparse
import io
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
from conftest import REAL_SCENES
from PIL import Image
from torch import nn

import geoaccel
from geoaccel import cli, memory
from geoaccel.cli import main, parser, pick_device
from geoaccel.export import atomic_folder, check_output_folder
from geoaccel.images.sources import FilePicture
from geoaccel.models.weights import save_model

# The options are a promise to people's scripts: changing them is a decision, not an accident.
OPTIONS = {
    "demo": {"--out", "--model", "--merging", "--scene", "--frames", "--device", "--overwrite"},
    "reconstruct": {
        "--out", "--model", "--merging", "--quantization", "--attention", "--formats", "--points", "--conf-percentile",
        "--masks", "--max-points", "--fps", "--max-frames", "--size", "--mode", "--device", "--dtype", "--overwrite",
    },
    "eval": {"--config", "--multirun", "-m", "--cfg"},
    "bench": {"--config", "--multirun", "-m", "--cfg"},
    "info": set(),
    "quantize export": {
        "--model", "--quantization", "--allocation", "--out", "--include", "--exclude", "--group-size", "--dtype",
        "--overwrite",
    },
    "quantize calibrate": {
        "--model", "--quantization", "--allocation", "--out", "--include", "--exclude", "--group-size", "--dtype",
        "--overwrite", "--images", "--co3d", "--co3d-subset", "--categories", "--scenes", "--frames", "--first-seed",
        "--evaluation", "--device", "--all-tokens", "--search", "--shortlist", "--rounding",
        "--camera-token",
    },
    "quantize sensitivity": {
        "--model", "--quantization", "--out", "--include", "--exclude", "--group-size", "--overwrite", "--images",
        "--co3d", "--co3d-subset", "--categories", "--scenes", "--frames", "--first-seed", "--evaluation", "--device",
        "--protect", "--budget-gb", "--max-effect", "--rank-by", "--draws",
    },
}  # fmt: skip


def photographs(folder: Path, count: int = 3, size: tuple[int, int] = (60, 80)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def checkpoint(tiny: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    save_model(tiny, path, dtype=torch.float32)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys: pytest.CaptureFixture[str], *args: Any, says: str) -> None:
    code, _, err = run(capsys, *args)
    lines = err.strip().splitlines()
    assert code == 2, err
    assert says in lines[-1], err
    assert "Traceback" not in err
    assert len([line for line in lines if line.startswith("geoaccel: ")]) == 1, err


def test_options_are_pinned() -> None:
    def commands(of: argparse.ArgumentParser, prefix: str = "") -> dict[str, set[str]]:
        deeper = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
        if not deeper:
            return {prefix.strip(): {o for action in of._actions for o in action.option_strings} - {"-h", "--help"}}
        return {k: v for name, sub in deeper[0].choices.items() for k, v in commands(sub, f"{prefix} {name}").items()}

    assert commands(parser()) == OPTIONS


def test_reconstruct(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = photographs(tmp_path / "photos"), tmp_path / "scene"
    formats = "ply,glb,colmap,colmap-text,nerfstudio,npz,png"
    code, stdout, err = run(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, "--formats", formats)
    assert code == 0, err
    assert "3 cameras in" in stdout
    assert "70 % of the pixels kept" in stdout
    for name in ("points.ply", "scene.glb", "sparse/0/cameras.bin", "sparse/0/points3D.txt", "transforms.json",
                 "contact_sheet.png"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="not empty")
    code, _, err = run(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, "--overwrite")
    assert code == 0, err


def test_bfloat16_and_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = photographs(tmp_path / "photos")
    args = ("--model", checkpoint, "--dtype", "bfloat16", "--size", 56, "--mode", "pad", "--formats", "npz")
    code, _, err = run(capsys, "reconstruct", photos, "--out", tmp_path / "scene", *args)
    assert code == 0, err
    assert "3 x 56 x 56 pixels" in err


def test_masks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trimesh

    photos, masks = photographs(tmp_path / "photos"), tmp_path / "masks"
    masks.mkdir()
    for index in range(3):
        picture = np.zeros((60, 80), dtype=np.uint8)
        picture[:, :40] = 255  # the left half
        Image.fromarray(picture).save(masks / (f"{index}.jpg.png" if index else "0.png"))
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "ply", "--conf-percentile", 0)
    code, out, err = run(capsys, *args, "--out", tmp_path / "left", "--masks", masks)
    assert code == 0, err
    assert "50 % of the pixels kept" in out
    assert run(capsys, *args, "--out", tmp_path / "all")[0] == 0
    counts = [len(trimesh.load(tmp_path / name / "points.ply").vertices) for name in ("left", "all")]
    assert 2 * counts[0] == counts[1]
    (masks / "1.jpg.png").unlink()
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", masks, says="no mask for 1.jpg")
    Image.new("L", (8, 8)).save(masks / "1.png")
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", masks, says="is 8x8, its photograph 1.jpg is 80x60")
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", tmp_path / "nowhere", says="no folder of masks")


# ----------------------------------------------------------------------------------- what is wrong, in one line


def no_photos(tmp: Path) -> Path:
    (tmp / "photos").mkdir()
    return tmp / "photos"


def truncated(tmp: Path) -> Path:
    folder = photographs(tmp / "photos")
    data = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(data[: len(data) // 2])
    return folder


def text_as_png(tmp: Path) -> Path:
    folder = photographs(tmp / "photos")
    (folder / "9.png").write_text("not a picture")
    return folder


def wild_sizes(tmp: Path) -> Path:
    folder = photographs(tmp / "photos", size=(30, 40))
    Image.new("RGB", (4000, 3000)).save(folder / "huge.jpg")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_photos, "is empty"),
        (lambda tmp: photographs(tmp / "photos", count=1), "at least two"),
        (truncated, "1.jpg"),
        (text_as_png, "9.png"),
        (wild_sizes, "huge.jpg"),
        (lambda tmp: tmp / "missing", "missing"),
    ],
)
def test_bad_photographs(checkpoint: Path, tmp_path: Path, capsys: Any, make: Any, says: str) -> None:
    out = tmp_path / "scene"
    refused(capsys, "reconstruct", make(tmp_path), "--out", out, "--model", checkpoint, says=says)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "vgt-mini"], "unknown model 'vgt-mini'"),
        (["--model", "missing.pt"], "no checkpoint at missing.pt"),
        (["--merging", "htm"], "unknown merging method 'htm'"),
        (["--quantization", "fp9"], "unknown quantization method 'fp9'"),
        (["--attention", "sdp"], "Did you mean 'sdpa'"),
        (["--formats", "ply,gbl"], "Did you mean 'glb'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--conf-percentile", "150"], "conf_percentile"),
        (["--max-frames", "0"], "max_frames"),
        (["--size", "3"], "no multiple of the patch size"),
        (["--size", "1400000"], "more than 8 times the size that the model was made for"),
        (["--fps", "2"], "fps"),
        (["--frmes", "2"], "unrecognized arguments"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, capsys: Any, args: list[str], says: str) -> None:
    photos, out = photographs(tmp_path / "photos"), tmp_path / "scene"
    model = [] if "--model" in args else ["--model", checkpoint]
    refused(capsys, "reconstruct", photos, "--out", out, *model, *args, says=says)
    assert not out.exists()


def test_bad_outputs(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = photographs(tmp_path / "photos")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/geoaccel"):
        refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="output")


def test_what_cannot_fit_is_refused_after_the_first_photograph(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, read = photographs(tmp_path / "photos"), []
    before = FilePicture.read
    monkeypatch.setattr(FilePicture, "read", lambda self: read.append(self.name) or before(self))
    monkeypatch.setattr("geoaccel.memory.free_bytes", lambda device: 1)
    refused(capsys, "reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, says="are free")
    assert len(read) == 1


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not run."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(geoaccel, "reconstruct", fail)


@pytest.mark.parametrize("what", ["folder", "result", "file", "pattern", "link", "video", "masks", "model"])
def test_overwriting_spares_what_is_read(checkpoint: Path, tmp_path: Path, capsys: Any, idle: None, what: str) -> None:
    """All of it came from an earlier run, which is why only the place can tell that it is needed."""
    out, photos, masks, model = tmp_path / "scene", photographs(tmp_path / "photos"), tmp_path / "masks", checkpoint
    with atomic_folder(out) as work:
        photographs(work / "images")
        photographs(work / "masks")
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
    photos = photographs(tmp_path / "photos")
    (tmp_path / "scene").mkdir()
    monkeypatch.chdir(tmp_path / "scene")
    args = ("reconstruct", photos, "--out", ".", "--model", checkpoint, "--formats", "nerfstudio")
    for more in ([], ["--overwrite"]):
        code, stdout, err = run(capsys, *args, *more)
        assert code == 0, err
        assert "wrote transforms.json" in stdout
    document = json.loads(Path("transforms.json").read_text())
    assert [frame["file_path"] for frame in document["frames"]] == [f"../photos/{index}.jpg" for index in range(3)]


def test_home_folders(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave ``--out=~/scene`` as it is."""
    photos = photographs(tmp_path / "photos")
    photographs(tmp_path / "masks")
    monkeypatch.setenv("HOME", str(tmp_path))
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "npz")
    code, stdout, err = run(capsys, *args, "--out=~/scene", "--masks=~/masks")
    assert code == 0, err
    assert f"wrote {tmp_path / 'scene' / 'reconstruction.npz'}" in stdout
    refused(capsys, *args, "--out=~nobody-of-this-name/scene", says="is not known here")
    code, stdout, err = run(capsys, "demo", "--out=~/demo", "--frames", 2, "--merging", "none", "--model", checkpoint)
    assert code == 0, err
    assert f"reconstruct {tmp_path / 'demo' / 'photos'} --out" in stdout


def test_names_that_are_not_utf8(checkpoint: Path, tmp_path: Path, capsys: Any, idle: None) -> None:
    photos = photographs(tmp_path / "photos")
    try:
        os.rename(photos / "1.jpg", os.fsencode(photos) + b"/foto_\xe4.jpg")
    except OSError:
        pytest.skip("this disk only has names in UTF-8")
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint)
    refused(capsys, *args, says=r"photograph foto_\xe4.jpg is not UTF-8, which colmap needs; rename the file")
    with pytest.raises(AssertionError, match="the model was run"):
        run(capsys, *args, "--formats", "ply,glb,npz")


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cpu:0", "cuda:", "cuda:-1", "cudacuda:0", "1"])
def test_devices_that_are_not_for_us(device: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown device '{device}'; known: auto, cpu, cuda, cuda:N"):
        pick_device(device)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = ("auto", "cpu", "cuda", "cuda:1")
    assert [pick_device(name) for name in asked] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="cuda:2 is not available here; the last one is cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(ValueError, match="cuda:0 is not available here; use --device cpu"):
        pick_device("cuda:0")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["reconstruct", "a", "--out", "b"], "nothing was left behind"),
        (["demo"], "nothing was left behind"),
        (["info"], "nothing was left behind"),
        (["eval"], "predictions of finished scenes are kept, and the same command goes on from there"),
        (["bench"], "what was timed is lost"),
    ],
)
def test_what_an_interruption_leaves(
    command: list[str], says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    for name in ("run_reconstruct", "run_demo", "run_info", "run_measurement"):
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


def test_too_little_memory(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    photos = photographs(tmp_path / "photos")
    out = tmp_path / "scene"
    refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="GiB are free")
    assert not out.exists()


def test_memory_advice_is_the_largest_number_that_fits(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    five = memory.estimate_bytes(tiny, frames=5, size=(70, 98))
    monkeypatch.setattr(memory, "free_bytes", lambda device: five)
    memory.check_memory(tiny, frames=5, size=(70, 98))
    with pytest.raises(ValueError, match="at most 5 frames fit"):
        memory.check_memory(tiny, frames=9, size=(70, 98))


def test_a_bug_of_ours_is_not_the_users_fault(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(geoaccel, "reconstruct", broken)
    with pytest.raises(RuntimeError, match="bug"):
        main(
            ["reconstruct", str(photographs(tmp_path / "p")), "--out", str(tmp_path / "s"), "--model", str(checkpoint)]
        )


def test_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while files are written: no output folder, no temporary folder."""
    slow = (
        "import time, geoaccel.export as e\n"
        "def hang(r, c, folder):\n"
        "    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(30)\n"
        "e.FORMATS._entries['ply'] = hang\n"
        "from geoaccel.cli import main\n"
        "raise SystemExit(main(['reconstruct', 'photos', '--out', 'scene', '--formats', 'ply']))\n"
    )
    photographs(tmp_path / "photos")
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


# ----------------------------------------------------------------------------------- demo and info


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "demo", "--out", tmp_path / "demo", "--frames", 3)
    assert code == 0, err
    for text in ("pose AUC@30", "depth error", "time", "peak memory"):
        assert text in out
    assert out.split()[:2] == ["dense", "httm"]
    (merged,) = (line.split() for line in out.splitlines() if "merged away" in line)
    assert merged[-4:-2] == ["0", "%"]
    (speedup,) = (line.split()[1:] for line in out.splitlines() if "speedup" in line)
    assert speedup[0] == "1.00x"
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"points.ply", "scene.glb", "contact_sheet.png", "photos"} <= names


def test_info_names_licences_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    for text in ("facebook/VGGT-1B", "non-commercial", "CC BY-NC", "sdpa: works", "vggt-mini"):
        assert text in out


def test_info_of_checkpoints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "commercial use: not allowed" in run(capsys, "info", "facebook/VGGT-1B")[1]
    assert "commercial use: allowed" in run(capsys, "info", "facebook/VGGT-1B-Commercial")[1]
    assert "Apache-2.0" in run(capsys, "info", "vggt-mini")[1]
    assert "keeps its licence" not in run(capsys, "info", "vggt-mini")[1]
    assert "published checkpoint keep its licence" in run(capsys, "info", checkpoint)[1]
    refused(capsys, "info", "vggt-mni", says="Did you mean 'vggt-mini'")


# ----------------------------------------------------------------------------------- real photographs


@pytest.mark.slow
@pytest.mark.skipif(not REAL_SCENES.is_dir(), reason="no real photographs here")
@pytest.mark.parametrize("scene", sorted(path.name for path in REAL_SCENES.glob("*")) if REAL_SCENES.is_dir() else [])
def test_real_photographs(scene: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported points, projected with the exported cameras, land on the pixels of the photographs they came from."""
    pycolmap = pytest.importorskip("pycolmap")
    import trimesh

    out = tmp_path / "scene"
    code, _, err = run(capsys, "reconstruct", REAL_SCENES / scene / "images", "--out", out, "--max-frames", 12)
    assert code == 0, err
    assert len(trimesh.load(out / "points.ply").vertices) > 1000
    assert trimesh.load(out / "scene.glb").geometry
    model = pycolmap.Reconstruction(str(out / "sparse" / "0"))
    worst = 0.0
    for image in model.images.values():
        size = Image.open(io.BytesIO((REAL_SCENES / scene / "images" / image.name).read_bytes())).size
        assert size == (image.camera.width, image.camera.height)
        seen = [point for point in image.points2D if point.has_point3D()]
        for point in seen[:: max(1, len(seen) // 200)]:
            projected = image.project_point(model.points3D[point.point3D_id].xyz)
            worst = max(worst, float(np.abs(projected - point.xy).max()))
    assert worst < 0.5


def test_packages_of_an_extra_that_are_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is computed."""
    photos, out = photographs(tmp_path / "photos"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "xformers", None)
    command = ("reconstruct", photos, "--out", out, "--model", checkpoint, "--attention", "xformers")
    refused(capsys, *command, says="attention='xformers' needs xformers")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    evaluation = ("eval", "data=synthetic", "data.scenes=1", "data.frames=2", f"model={checkpoint}", f"out={out}")
    refused(capsys, *evaluation, "timing.repeats=0", says="which point metrics need: pip install 'geoaccel[eval]'")
    assert not out.exists()
