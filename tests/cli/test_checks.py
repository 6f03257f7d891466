"""What can be known to be wrong is known before the model is loaded, and what a refusal advises works."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused, run, write_images
from references import Golden
from torch import nn

import geoaccel
from geoaccel import memory
from geoaccel.backbone import Preprocess
from geoaccel.images import load_images
from geoaccel.models.weights import save_model
from geoaccel.scene_command import for_photographs


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of the backbone that stretches every image to the shape of the first."""
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    save_model(Golden("pi3_tiny", "pi3").network(), path, dtype=torch.float32)
    return path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--conf-percentile", "150"], "conf_percentile=150.0 is not in [0, 100)"),
        (["--conf-percentile", "nan"], "conf_percentile=nan is not in [0, 100)"),
        (["--max-points", "0"], "max_points=0 is too small; give 1 or more"),
        (["--intrinsics", "-440"], "focal lengths in pixels must be positive"),
        (["--intrinsics", "nan,440,1,1"], "focal lengths in pixels must be positive"),
        (["--intrinsics", "{one}"], "contains one camera without cx and cy"),
        (["--positions", "{twice}"], "gives 0.jpg two positions; remove one of these lines"),
        (["--positions", "{still}"], "gives all images the same position"),
        (["--reference", "3"], "reference=3 is not a frame; give auto, first or the number of an image, 0 to 2"),
        (["--refine", "ba", "--points", "head"], "refine cannot change"),
        (["a.mp4"], "a.mp4 is a video and cannot be combined with other inputs; give it alone"),
        (["--edge-filter", "0"], "edge_filter=0.0 is not allowed; give the relative jump"),
        (["--edge-filter", "nan"], "try 0.25"),
        (["--max-frames", "0"], "max_frames=0 (--max-frames); it must be at least 1"),
        (["--size", "-14"], "size=-14 (--size) is not allowed"),
        (["--fps", "2"], "fps=2 applies only to videos"),
        (["--fps", "nan"], "fps=nan must be a positive number"),
        (["--formats", "ply,gbl"], "Did you mean 'glb'"),
        (["--merging", "htm"], "unknown merging method 'htm'"),
        (["--merging", "httm,fastvggt"], "choose one"),
        (["--quantization", "fp9"], "unknown quantization method 'fp9'"),
        (["--attention", "sdp"], "Did you mean 'sdpa'"),
        (["--layers", "{{"], "--layers { is not valid YAML; give"),
        (["--layers", "{{0: htm}}"], "Did you mean 'httm'"),
        (["--plan", "nowhere"], "plan nowhere does not exist; make one with geoaccel tune"),
        (["--plan", "{masks}"], "is a folder; give the file in it that geoaccel tune wrote"),
        (["--poses", "{cameras}"], "names none of the images (first 0.jpg); it has other.jpg"),
        (["--intrinsics", "{cameras}"], "names none of the images (first 0.jpg); it has no frame with one"),
        (["--intrinsics", "{odd}"], "the camera of other.jpg is not numeric"),
        (["--depths", "nowhere"], "folder of depths nowhere does not exist"),
        (["--depths", "{masks}"], "contains no depth of any image; expected 0.npy or 0.png"),
        (["{text}"], "text.txt is not a readable image"),
        (["{long}"], "one side may be at most 20 times the other"),
        (["{dangling}"], "gone.jpg is a broken link; repair it, or remove it, or leave out"),
        (["--model", " "], "--model is empty; give a value, or leave it out"),
        (["--attention", "xformers"], "attention='xformers' needs xformers"),
        (["--masks", ""], "--masks is empty; give a value, or leave it out"),
        (["--poses", ""], "--poses is empty"),
        (["--intrinsics", ""], "--intrinsics is empty"),
        (["--depths", ""], "--depths is empty"),
        (["--positions", ""], "--positions is empty"),
        (["--plan", ""], "--plan is empty"),
        (["--masks", "nowhere"], "folder of masks nowhere does not exist"),
        (["--masks", "{masks}"], "no mask for 2.jpg"),
        (["{missing}"], "does not exist"),
    ],
)
def test_before_the_model_is_loaded(tmp_path: Path, capsys: Any, monkeypatch: Any, args: list[str], says: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(geoaccel, "load_model", fail)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setattr("geoaccel.sharding.launch.pick_device", lambda name: "cpu")
    photos, masks = write_images(tmp_path / "photos"), write_images(tmp_path / "masks", count=2)
    files = {"one": '{"fl_x": 440}', "twice": "0.jpg 0 0 0\n1.jpg 1 0 0\n0.jpg 0 1 0\n2.jpg 1 1 1\n"}
    files["still"] = "".join(f"{n}.jpg 5 5 5\n" for n in range(3))
    for name, text in files.items():
        (tmp_path / f"{name}.json" if name == "one" else tmp_path / f"{name}.txt").write_text(text)
    named = {name: next(tmp_path.glob(f"{name}.*")) for name in files}
    named["cameras"], named["text"] = tmp_path / "cameras.json", tmp_path / "text.txt"
    named["cameras"].write_text('{"frames": [{"file": "other.jpg", "extrinsic": [[1,0,0,0],[0,1,0,0],[0,0,1,0]]}]}')
    named["text"].write_text("no picture")
    named["odd"] = tmp_path / "odd.json"
    named["odd"].write_text('{"frames": [{"file": "other.jpg", "fl_x": "wide", "cx": 1, "cy": 1}]}')
    named["long"] = write_images(tmp_path / "long", size=(10, 4000))
    named["dangling"] = write_images(tmp_path / "dangling")
    (named["dangling"] / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    given = [arg.format(masks=masks, missing=tmp_path / "missing", **named) for arg in args]
    source = [] if given[0].startswith("/") else [photos]
    refused(capsys, "reconstruct", *source, *given, "--out", tmp_path / "scene", says=says)
    assert not (tmp_path / "scene").exists()


def test_one_bad_photograph_of_several_scenes_does_not_keep_the_others_from_being_made(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    good, bad = write_images(tmp_path / "good"), write_images(tmp_path / "bad")
    (bad / "1.jpg").write_text("no picture")
    command = ["reconstruct", good, bad, "--scenes", "--out", tmp_path / "out", "--model", checkpoint, *SMALL]
    refused(capsys, *command, says="1 of 2 scenes failed: bad")
    assert (tmp_path / "out" / "good" / "files.json").exists()


@pytest.mark.parametrize(
    "option", [["--layers", "{"], ["--plan", "nowhere"], ["--depths", "nowhere"], ["--intrinsics", "{}"]]
)
def test_a_dry_run_refuses_what_the_run_would(checkpoint: Path, tmp_path: Path, capsys: Any, option: list[str]) -> None:
    photos = write_images(tmp_path / "photos")
    command = ["reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, "--dry-run", *option]
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, ""), err


def test_a_dry_run_refuses_intrinsics_of_other_photographs(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos, cameras = write_images(tmp_path / "photos"), tmp_path / "cameras.json"
    cameras.write_text('{"fl_x": 50, "cx": 10, "cy": 10, "frames": [{"file_path": "other.jpg"}]}')
    command = ["reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, "--dry-run"]
    refused(capsys, *command, "--intrinsics", cameras, says="names none of the images (first 0.jpg); it has other.jpg")


def test_a_dry_run_counts_the_track_head_where_it_is_to_run(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("pycolmap")
    tracker, photos = tmp_path / "vggt.safetensors", write_images(tmp_path / "photos")
    save_model(Golden("vggt_tiny", "vggt").network(), tracker, dtype=torch.float32)
    command = ["reconstruct", photos, "--out", tmp_path / "scene", "--dry-run"]
    needed = []
    for tracks in ("auto", "head"):
        code, out, err = run(capsys, *command, "--model", tracker, "--tracks", tracks)
        assert code == 0, err
        needed.append(json.loads(out)["memory_gib"])
    assert needed[1] > needed[0]
    refused(capsys, *command, "--model", checkpoint, "--tracks", "head", says="needs a track head; this model has")


def test_an_empty_name_of_the_output_folder(tmp_path: Path, capsys: Any) -> None:
    refused(capsys, "reconstruct", write_images(tmp_path / "photos"), "--out", "", says="--out is empty; name the")


SMALL = ("--formats", "npz", "--size", "56")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--frames", "1"], "needs at least 2"),
        (["--merging", "htm"], "unknown merging method 'htm'"),
        (["--scene", "-1"], "scenes have numbers from 0"),
        (["--scene", str(2**63)], "scenes have numbers from 0"),
    ],
)
def test_the_demo_before_its_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any, args: list[str], says: str
) -> None:
    monkeypatch.setattr("geoaccel.eval.tools.demo.load_model", None)
    refused(capsys, "demo", "--out", tmp_path / "demo", *args, says=says)


def upright_and_lying(folder: Path) -> Path:
    write_images(folder, count=2, size=(60, 96))
    write_images(folder / "more", count=1, size=(96, 40))
    (folder / "more" / "0.jpg").rename(folder / "upright.jpg")
    return folder


@pytest.mark.parametrize(
    ("make", "args", "advice", "remedy"),
    [
        (upright_and_lying, [], r"pad them \((--mode) (pad),", r"\1 \2"),
        (write_images, ["--size", "45"], r"try (\d+)", r"--size \1"),
        (write_images, ["--fps", "2"], r"\((--max-frames)\)", r"\1 2"),
        (write_images, ["--max-frames", "0"], r"at least (\d)", r"--max-frames \1"),
        (write_images, ["--conf-percentile", "100"], r"(\d) keeps every point", r"--conf-percentile \1"),
        (write_images, ["--formats", "np"], r"Did you mean '(\w+)'", r"--formats \1"),
        (write_images, ["--device", "gpu"], r"known: auto, (cpu)", r"--device \1"),
        (write_images, ["--max-points", "0"], r"give (\d) or more", r"--max-points \1"),
    ],
)
def test_what_a_refusal_advises_works(
    checkpoint: Path, tmp_path: Path, capsys: Any, make: Any, args: list[str], advice: str, remedy: str
) -> None:
    photos = make(tmp_path / "photos")
    command = ["reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL]
    code, _, err = run(capsys, *command, *args)
    found = re.search(advice, err.strip().splitlines()[-1])
    assert code == 2
    assert found, err
    code, _, err = run(capsys, *command, *found.expand(remedy).split())
    assert code == 0, err


def test_advice_where_an_earlier_result_is_and_where_memory_is_short(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, model = write_images(tmp_path / "photos", count=4), geoaccel.load_model(checkpoint)
    command = ["reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL]
    preprocess = dataclasses.replace(model.preprocess, size=56, max_pixels=56**2)
    size = tuple(load_images(photos, preprocess).images.shape[-2:])
    three = memory.estimate_bytes(model, frames=3, size=size) + 3 * memory.PIXEL_BYTES * 3 * size[0] * size[1]
    monkeypatch.setattr(memory, "free_bytes", lambda device: three)
    _, _, err = run(capsys, *command)
    advice = re.search(r"--max-frames \d", err)
    assert advice, err
    assert run(capsys, *command, *advice[0].split())[0] == 0
    _, _, err = run(capsys, *command, *advice[0].split())
    advised = re.search(r"--overwrite", err)
    assert advised, err
    assert run(capsys, *command, *advice[0].split(), advised[0])[0] == 0


def test_lying_and_upright_pictures_with_crop(tmp_path: Path) -> None:
    """Beyond what ``crop`` takes; the mode that is advised takes them."""
    pictures = [np.zeros((40, 140, 3), np.uint8), np.zeros((140, 40, 3), np.uint8)]
    rule = Preprocess(size=112)
    with pytest.raises(ValueError, match=r"in Python Preprocess\(mode='pad'\)"):
        load_images(pictures, rule)
    assert len(load_images(pictures, Preprocess(mode="pad", size=112))) == 2


def test_a_mini_says_that_it_is_for_tests(tiny: nn.Module, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(geoaccel, "load_model", lambda *_, **__: tiny)
    command = ("reconstruct", write_images(tmp_path / "photos"), *SMALL, "--model")
    name, other = {"vggt": ("vggt-mini", "facebook/VGGT-1B"), "pi3": ("pi3-mini", "yyfz233/Pi3")}[tiny.backbone.name]
    _, _, err = run(capsys, *command, name, "--out", tmp_path / "a")
    line = f"warning: {name} is a test model; for photographs use --model {other}"
    assert err.splitlines().count(line) == 1
    _, _, err = run(capsys, *command, tmp_path / "weights.safetensors", "--out", tmp_path / "b")
    assert "instrument" not in err
    assert for_photographs("weights.safetensors", tiny) is None
