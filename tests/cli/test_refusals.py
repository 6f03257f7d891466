"""What is wrong is said in one line, with exit code 2, before anything is computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from geoaccel import memory
from geoaccel.images.sources import FilePicture
from geoaccel.models.weights import save_model
from geoaccel.testing import tiny_network


def no_photos(tmp: Path) -> Path:
    (tmp / "photos").mkdir()
    return tmp / "photos"


def truncated(tmp: Path) -> Path:
    folder = write_images(tmp / "photos")
    data = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(data[: len(data) // 2])
    return folder


def text_as_png(tmp: Path) -> Path:
    folder = write_images(tmp / "photos")
    (folder / "9.png").write_text("not a picture")
    return folder


def wild_sizes(tmp: Path) -> Path:
    folder = write_images(tmp / "photos", size=(30, 40))
    Image.new("RGB", (4000, 3000)).save(folder / "huge.jpg")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_photos, "is empty"),
        (truncated, "1.jpg"),
        (text_as_png, "9.png"),
        (wild_sizes, "huge.jpg"),
        (lambda tmp: tmp / "missing", "missing"),
    ],
)
def test_bad_images(checkpoint: Path, tmp_path: Path, capsys: Any, make: Any, says: str) -> None:
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
        (["--merging", ""], "'' names no merging method; give none, or leave out the option"),
        (["--quantization", "fp9"], "unknown quantization method 'fp9'"),
        (["--attention", "sdp"], "Did you mean 'sdpa'"),
        (["--formats", "ply,gbl"], "Did you mean 'glb'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--conf-percentile", "150"], "conf_percentile"),
        (["--max-frames", "0"], "max_frames=0 (--max-frames); it must be at least 1"),
        (["--size", "3"], "not a multiple of the patch size"),
        (["--size", "1400000"], "more than 8 times the model's own size"),
        (["--size", "1400001"], "more than 8 times the model's own size"),
        (["--fps", "2"], "fps"),
        (["--frmes", "2"], "unrecognized arguments"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, capsys: Any, args: list[str], says: str) -> None:
    photos, out = write_images(tmp_path / "photos"), tmp_path / "scene"
    model = [] if "--model" in args else ["--model", checkpoint]
    refused(capsys, "reconstruct", photos, "--out", out, *model, *args, says=says)
    assert not out.exists()


def test_an_output_folder_that_leads_to_itself(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "loop"
    out.symlink_to(out)
    photos = write_images(tmp_path / "photos")
    refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="choose another output folder")


def test_what_cannot_fit_is_refused_after_the_first_image(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, read = write_images(tmp_path / "photos"), []
    before = FilePicture.read
    monkeypatch.setattr(FilePicture, "read", lambda self, *given: read.append(self.name) or before(self, *given))
    monkeypatch.setattr("geoaccel.memory.free_bytes", lambda device: 1)
    refused(capsys, "reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, says="are free")
    assert len(read) == 1


def test_too_little_memory(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    photos = write_images(tmp_path / "photos")
    out = tmp_path / "scene"
    refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="0.01 MB are free")
    assert not out.exists()


def test_memory_advice_is_the_largest_number_that_fits(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    five = memory.estimate_bytes(tiny, frames=5, size=(70, 98))
    monkeypatch.setattr(memory, "free_bytes", lambda device: five)
    memory.check_memory(tiny, frames=5, size=(70, 98))
    with pytest.raises(ValueError, match="at most 5 frames fit"):
        memory.check_memory(tiny, frames=9, size=(70, 98))


def test_packages_of_an_extra_that_are_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is computed."""
    photos, out = write_images(tmp_path / "photos"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "xformers", None)
    command = ("reconstruct", photos, "--out", out, "--model", checkpoint, "--attention", "xformers")
    refused(capsys, *command, says="attention='xformers' needs xformers")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    evaluation = ("eval", "data=synthetic", "data.scenes=1", "data.frames=2", f"model={checkpoint}", f"out={out}")
    refused(capsys, *evaluation, "timing.repeats=0", says="pip install 'geoaccel[eval]'")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "key", "text", "says"),
    [
        ("info", "config", "{", "is not JSON"),
        ("info", "config", "[1]", "is a JSON list, not an object"),
        ("info", "provenance", "no", "is not JSON"),
        ("reconstruct", "config", "{", "is not JSON"),
        ("reconstruct", "config", "[1]", "is a JSON list, not an object"),
        ("reconstruct", "config", '{"nonsense": 3}', "is not valid for"),
        ("reconstruct", "config", '{"patch_size": "large"}', "is not valid for"),
        ("reconstruct", "config", '{"patch_size": -14}', "is not valid for"),
        ("reconstruct", "config", '{"patch_size": 0}', "is not valid for"),
        ("reconstruct", "quantization", "{", "has damaged records of its quantized layers"),
        ("reconstruct", "quantization", '[{"name": "fp9"}]', "has damaged records of its quantized layers"),
    ],
)
def test_what_a_checkpoint_says_of_itself_may_be_anything(
    checkpoint: Path, tmp_path: Path, capsys: Any, command: str, key: str, text: str, says: str
) -> None:
    """A file is the user's, and so is every word in it."""
    with safe_open(checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), key: text}
    save_file(tensors, checkpoint, metadata)
    args = ("reconstruct", write_images(tmp_path / "photos"), "--out", tmp_path / "scene", "--model")
    refused(capsys, *(("info",) if command == "info" else args), checkpoint, says=says)


def test_conditions_are_refused_before_the_model_runs(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone that takes none, a file that is not there, and poses that are no rotations."""
    photos, out = write_images(tmp_path / "photos"), tmp_path / "scene"
    paths = {}
    for name in ("pi3", "pi3x"):
        network = tiny_network(name)
        monkeypatch.setattr(type(network), "predict", lambda *_: pytest.fail("the model ran"))
        paths[name] = tmp_path / f"{name}.safetensors"
        save_model(network, paths[name], dtype=torch.float32)
    start = ("reconstruct", photos, "--out", out, "--model")
    depths = tmp_path / "depths"
    depths.mkdir()
    np.save(depths / "0.npy", np.ones((4, 4), np.float32))
    refused(capsys, *start, paths["pi3"], "--depths", depths, says="pi3 does not accept depths")
    refused(capsys, *start, paths["pi3x"], "--poses", tmp_path / "none.json", says="does not exist")
    refused(capsys, *start, paths["pi3x"], "--intrinsics", -50, says="focal lengths in pixels must be positive")
    frames = [{"file": "0.jpg", "extrinsic": [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]]}]
    (tmp_path / "known.json").write_text(json.dumps({"frames": frames}))
    refused(
        capsys, *start, paths["pi3x"], "--poses", tmp_path / "known.json", says="poses of frame 0 contain no rotation"
    )
    assert not out.exists()
