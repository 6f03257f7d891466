"""Single images, bad ones that are left out, subfolders, several scenes, dry runs, and the line of JSON."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)
from PIL import Image

import geoaccel
from geoaccel.cli import parser
from geoaccel.models.outline import without_weights
from geoaccel.scene_command import OPTIONS
from geoaccel.windows_command import check_windows

SMALL = ("--formats", "npz", "--size", "56")


def summary(stdout: str) -> dict[str, Any]:
    """The one line on stdout."""
    (line,) = stdout.splitlines()
    return json.loads(line)


def names_in(folder: Path) -> list[str]:
    with np.load(folder / "reconstruction.npz") as arrays:
        return arrays["names"].tolist()


def test_options_have_the_names_that_python_has() -> None:
    known = inspect.signature(geoaccel.reconstruct).parameters
    assert set(OPTIONS) <= set(known)
    parsed = parser().parse_args(["reconstruct", "a", "--out", "b"])
    check_windows(parsed)  # fills in what is usual
    args = vars(parsed)
    assert set(OPTIONS) <= set(args)
    for name in set(OPTIONS):
        assert args[name] == known[name].default, name
    saved = inspect.signature(geoaccel.Reconstruction.save).parameters
    for name in ("images", "overwrite", "conf_percentile", "max_points"):
        assert args[name] == saved[name].default, name


def test_the_command_and_python_do_the_same(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos", 4)
    given = {"size": 56, "mode": "pad", "shared_camera": True, "square_pixels": True, "edge_filter": 30.0}
    options = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    args = ("--out", tmp_path / "a", "--model", checkpoint, "--formats", "npz", *options, "--scale", "0,2=3m")
    code, out, err = run(capsys, "reconstruct", photos, *args)
    assert code == 0, err
    result = geoaccel.reconstruct(photos, model=geoaccel.load_model(checkpoint), **given, scale="0,2=3m")
    result.save(tmp_path / "b", formats="npz")
    with np.load(tmp_path / "a" / "reconstruction.npz") as ours, np.load(tmp_path / "b" / "reconstruction.npz") as same:
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], same[name])
        centres = [-pose[:3, :3].T @ pose[:3, 3] for pose in ours["cam_from_world"]]
        assert np.linalg.norm(centres[0] - centres[2]) == pytest.approx(3, rel=1e-4)
        assert str(ours["unit"]) == "metre"
    said, found = summary(out), result.summary()
    for name in ("frames", "size", "unit", "scale", "edge_share", "left_out"):
        assert said[name] == found[name], name
    assert (said["frames"], said["size"], said["formats"]) == (4, [56, 56], ["npz"])
    assert f"{100 * said['edge_share']:.1f} % of the pixels, at depth edges" in err


def test_a_single_image(checkpoint: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    photos = write_images(tmp_path / "photos", 1)
    args = ("--model", checkpoint, "--size", "56", "--formats", "all")
    code, out, err = run(capsys, "reconstruct", photos / "0.jpg", "--out", tmp_path / "scene", *args)
    assert code == 0, err
    assert "one image: its camera and depth rest on the network's prior alone" in caplog.text
    assert summary(out)["frames"] == 1
    assert names_in(tmp_path / "scene") == ["0.jpg"]


def spoilt(folder: Path) -> Path:
    """Three good ones, one that is cut off, one that is text, one that is too small."""
    write_images(folder, 3)
    data = (folder / "0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not a picture")
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return folder


def test_bad_images_are_left_out_by_name(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = spoilt(tmp_path / "photos")
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL)
    way_out = ", or leave out such images (--skip-bad, skip_bad=True)"
    refused(capsys, *args, says=f"link.png is a broken link; repair it, or remove it{way_out}")
    (photos / "link.png").rename(tmp_path / "link.png")
    # By its first bytes, before the model is loaded.
    refused(
        capsys,
        *args,
        says="text.png is not a readable image; convert it to JPEG or PNG, or remove it" + way_out,
    )
    (photos / "text.png").rename(tmp_path / "text.png")
    refused(capsys, *args, says="cut.jpg")
    (tmp_path / "link.png").rename(photos / "link.png")
    (tmp_path / "text.png").rename(photos / "text.png")
    code, out, err = run(capsys, *args, "--skip-bad")
    assert code == 0, err
    assert names_in(tmp_path / "scene") == ["0.jpg", "1.jpg", "2.jpg"]
    left_out = summary(out)["left_out"]
    assert list(left_out) == ["cut.jpg", "link.png", "text.png", "tiny.png"]
    for name, why in left_out.items():
        assert f"left out {name}: {why}" in err
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.png").write_text("nothing")
    command = ("reconstruct", only, "--out", tmp_path / "none", "--model", checkpoint, *SMALL, "--skip-bad")
    refused(capsys, *command, says="none of the 1 images can be used; first a.png")


def test_subfolders(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = tmp_path / "photos"
    for name in ("left", "right", ".hidden"):
        write_images(photos / name, 2)
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL)
    refused(capsys, *args, says="use --recursive")
    code, _, err = run(capsys, *args, "--recursive")
    assert code == 0, err
    assert names_in(tmp_path / "scene") == ["left/0.jpg", "left/1.jpg", "right/0.jpg", "right/1.jpg"]


def test_several_scenes_at_once(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folders = [write_images(tmp_path / name, count) for name, count in (("a", 2), ("b", 3))]
    (tmp_path / "bad").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "bad" / name).write_text("not a picture")
    loaded, load = [], geoaccel.load_model
    monkeypatch.setattr(geoaccel, "load_model", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    args = ("--scenes", "--out", tmp_path / "out", "--model", checkpoint, *SMALL)
    code, out, err = run(capsys, "reconstruct", *folders, *args)
    assert code == 0, err
    assert len(loaded) == 1
    found = [json.loads(line) for line in out.splitlines()]
    assert [(Path(one["out"]).name, one["frames"]) for one in found] == [("a", 2), ("b", 3)]
    assert names_in(tmp_path / "out" / "b") == ["0.jpg", "1.jpg", "2.jpg"]
    code, out, err = run(capsys, "reconstruct", tmp_path / "bad", *folders, *args, "--overwrite")
    assert code == 2
    assert "1 of 3 scenes failed: bad; see above" in err.splitlines()[-1]
    assert "bad: " in err
    assert len(out.splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    again = write_images(tmp_path / "more" / "a", 2)
    refused(capsys, "reconstruct", folders[0], again, *args, says="two scenes would be written to")
    refused(capsys, "reconstruct", *folders[0].iterdir(), *args, says="leave out --scenes for one scene")


def test_a_dry_run_says_what_a_run_would_do(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    photos = write_images(tmp_path / "photos", 3)
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, "--size", "56")
    formats = ("--formats", "ply,colmap,tum,npz")
    monkeypatch.setattr(geoaccel, "reconstruct", None)
    code, out, err = run(capsys, *args, *formats, "--dry-run")
    assert code == 0, err
    assert not (tmp_path / "scene").exists()
    plan = summary(out)
    assert (plan["frames"], plan["dry_run"]) == (3, True)
    assert 0 < plan["memory_gib"] < plan["free_gib"]
    assert "3 images" in err
    assert "GiB on" in err
    monkeypatch.undo()
    code, out, err = run(capsys, *args, *formats)
    assert code == 0, err
    assert summary(out)["size"] == plan["size"]
    written = json.loads((tmp_path / "scene" / "files.json").read_text())
    assert written["formats"].keys() == plan["writes"].keys()
    for name, places in plan["writes"].items():
        assert all(file.startswith(tuple(places)) for file in written["formats"][name]), name
    monkeypatch.setattr("geoaccel.dry_run.free_bytes", lambda device: 1000)
    refused(capsys, *args, *formats, "--dry-run", "--overwrite", says="take fewer frames (--max-frames)")


def test_a_dry_run_downloads_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any, tiny: Any) -> None:
    """Of a published checkpoint its sizes are known."""
    from geoaccel import dry_run
    from geoaccel.backbone import Origin

    origin = Origin("Free", True, ("model.safetensors",), config=tiny.backbone.tiny.to_dict())
    monkeypatch.setattr(dry_run, "origins", lambda: {"somebody/tiny": (tiny.backbone, origin)})
    monkeypatch.setattr(dry_run, "load_model", None)
    photos = write_images(tmp_path / "photos", 3)
    args = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", "somebody/tiny", "--size", "56", "--dry-run")
    code, out, err = run(capsys, *args)
    assert code == 0, err
    network = without_weights(tiny.backbone, origin.config, torch.float32)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert summary(out)["memory_gib"] * 2**30 > weights


def test_known_positions_are_reported(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos", 7)
    plain = geoaccel.reconstruct(photos, model=geoaccel.load_model(checkpoint), size=56)
    centres = -(plain.cam_from_world[:, :3, :3].mT @ plain.cam_from_world[:, :3, 3:])[..., 0]
    lines = [f"{name},{x},{y},{z}" for name, (x, y, z) in zip(plain.names, (5 * centres).tolist(), strict=True)]
    lines[2] = "2.jpg,100,100,100"
    (tmp_path / "places.csv").write_text("\n".join(["name,x,y,z", *lines]))
    args = ("--out", tmp_path / "scene", "--model", checkpoint, *SMALL, "--positions", tmp_path / "places.csv")
    code, out, err = run(capsys, "reconstruct", photos, *args)
    assert code == 0, err
    assert "6 of 7 positions agree" in err
    assert "position of 2.jpg is off by" in err
    assert "unit: that of the given positions" in err
    found = summary(out)["positions"]
    assert found["scale"] == pytest.approx(5, rel=1e-2)
    assert list(found["wrong"]) == ["2.jpg"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--scale", "0,1"], "give two images and the distance of their cameras, as a.jpg,b.jpg=1.25m"),
        (["--scale", "0,9=1m"], "unknown image '9'; known: 0.jpg, 1.jpg, 2.jpg"),
        (["--scale", "0,1=0m"], "the distance must be a positive number"),
        (["--scale", "0,1=1lightyear"], "unknown unit of length 'lightyear'"),
        (["--scale", "1,1.jpg=1m"], "names the same image twice"),
        (["--scale", "0,1=1m", "--positions", "{good}"], "give one of them (--scale or --positions)"),
        (["--scale", "0,1=1m", "--poses", "{poses}"], "leave out scale and positions, or the poses"),
        (["--positions", "nowhere.txt"], "nowhere.txt does not exist; give a file of positions"),
        (["--positions", "{photos}"], "does not exist; give a file of positions"),
        (["--positions", "{short}"], "has 2 positions; give at least three"),
        (["--positions", "{words}"], "line 1 of {words} is 'the,cameras,stood,there'"),
        (["--positions", "{others}"], "names none of the images (first 0.jpg)"),
        (["--positions", "{gps}"], "at latitude 95"),
        (["--intrinsics", "1,2"], "are 2 numbers; give f or fx,fy,cx,cy"),
        (["--intrinsics", "nowhere.json"], "nowhere.json does not exist"),
        (["--intrinsics", "{words}"], "is not JSON"),
        (["--intrinsics", "{empty}"], "has no list of frames"),
        (["--poses", "{empty}"], "has no list of frames"),
        (["--points", "head", "--shared-camera"], "shared_camera cannot change; use points='depth'"),
        (["--points", "head", "--intrinsics", "90"], "intrinsics cannot change"),
        (["--formats", ""], "no output format was given; known: colmap"),
        (["--formats", "al"], "unknown output format 'al'"),
        (["--images", "move"], "invalid choice: 'move'"),
        (["--images", "none", "--formats", "colmap", "{turned}"], "is rotated by its EXIF tag"),
        (["--size", "1.5"], "invalid int value: '1.5'"),
        (["--mode", "stretch"], "invalid choice: 'stretch'"),
        (["{photos}", "--scenes"], "two scenes would be written to"),
        (["--recursive", "{nothing}"], "is empty"),
        (["--out", "{photos}"], "is not empty"),
        (["--dry-run", "--model", "vggt-mni"], "Did you mean 'vggt-mini'"),
    ],
)
def test_what_is_wrong_with_these_is_one_line_before_the_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any, args: list[str], says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(geoaccel, "load_model", fail)
    monkeypatch.setattr("geoaccel.sharding.launch.pick_device", lambda name: "cpu")
    made = {name: str(tmp_path / name) for name in ("photos", "turned", "nothing")}
    for name, text in {
        "good": "0 0 0 0\n1 1 0 0\n2 0 1 0",
        "short": "0 0 0 0\n1 1 0 0",
        "words": "the cameras stood there",
        "others": "x 0 0 0\ny 1 0 0\nz 0 1 0",
        "gps": "name,lat,lon,alt\n0,95,0,0\n1,0,0,0\n2,0,0,0",
        "poses": '{"frames": [{"file": "0.jpg"}]}',
        "empty": '{"frames": []}',
    }.items():
        made[name] = str(tmp_path / f"{name}.txt")
        Path(made[name]).write_text(text)
    write_images(tmp_path / "photos")
    (tmp_path / "nothing").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    write_images(tmp_path / "turned", 1)
    Image.new("RGB", (80, 60)).save(tmp_path / "turned" / "1.jpg", exif=exif)
    given = [arg.format(**made) for arg in args]
    source = [] if given[-1] in (made["turned"], made["nothing"]) else [made["photos"]]
    out = [] if "--out" in given else ["--out", tmp_path / "scene"]
    refused(capsys, "reconstruct", *source, *given, *out, says=says.format(**made))
    assert not (tmp_path / "scene").exists()
