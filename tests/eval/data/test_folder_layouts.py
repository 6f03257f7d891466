"""Folders of one's own: COLMAP models, poses.json, transforms.json; and real photographs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import TREES
from reading import read_one, reason
from tree_parts import camera_poses, pinhole, write_text

from geoaccel.cameras import project_points, unproject_depth
from geoaccel.eval.data.registry import DATASETS

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_models_that_colmap_itself_writes(tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    tree = TREES["folder_colmap_text"](tmp_path, camera_poses())
    model = tmp_path / "wall" / "sparse" / "0"
    for path in tree.images:  # pycolmap reads names up to a space
        path.rename(path.with_name(path.name.replace(" ", "_")))
    images = model / "images.txt"
    images.write_text(images.read_text().replace("a view ", "a_view_"))
    expected = read_one(tree)
    write_text(model / "points3D.txt", "# the tracks of the tree are not consistent")
    rows = [line if i % 2 == 0 else "" for i, line in enumerate(images.read_text().splitlines()[1:])]
    write_text(images, *rows)
    reconstruction = pycolmap.Reconstruction(str(model))
    for path in model.iterdir():
        path.unlink()
    reconstruction.write_binary(str(model))
    binary = read_one(tree)
    for path in model.iterdir():
        path.unlink()
    reconstruction.write_text(str(model))
    for scene in (binary, read_one(tree)):
        torch.testing.assert_close(scene.cam_from_world, expected.cam_from_world, atol=1e-9, rtol=0)
        assert torch.equal(scene.intrinsics, expected.intrinsics)
        assert scene.image_paths == expected.image_paths
        with pytest.raises(ValueError, match="no 3D points"):
            scene.points()


def test_distorting_lenses_have_no_intrinsics(tmp_path: Path) -> None:
    tree = TREES["folder_colmap_text"](tmp_path, camera_poses())
    cameras = tmp_path / "wall" / "sparse" / "0" / "cameras.txt"
    for line, known in (
        ("3 SIMPLE_PINHOLE 64 48 60 33.5 24.5", True),
        ("3 OPENCV 64 48 60 62 33.5 24.5 0 0 0 0", True),
        ("3 SIMPLE_RADIAL 64 48 60 33.5 24.5 0.01", False),
        ("3 OPENCV_FISHEYE 64 48 60 62 33.5 24.5 0 0 0 0", False),
        ("3 NEW_MODEL 64 48 60 62 33.5 24.5", False),
    ):
        write_text(cameras, line)
        assert (read_one(tree).intrinsics is not None) == known
    write_text(cameras, "3 PINHOLE 64 48 nan 62 33.5 24.5")
    assert "PINHOLE camera with invalid parameters" in reason(tree)
    write_text(cameras, "3 PINHOLE 32 24 60 62 33.5 24.5")
    assert "its COLMAP camera (24, 32)" in reason(tree)
    write_text(cameras, "4 PINHOLE 64 48 60 62 33.5 24.5")
    assert "with undefined cameras [3]" in reason(tree)


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("cameras", "3 PINHOLE 64 48 f 62 33.5 24.5", "could not convert string to float: 'f'"),
        ("cameras", "3 PINHOLE 64.0 48 60 62 33.5 24.5", "invalid literal for int() with base 10: '64.0'"),
        ("cameras", "3 PINHOLE 64 48 60", "PINHOLE has 4 parameters, not 1"),
        ("cameras", "3 SIMPLE_RADIAL 64 48 60 62 33.5 24.5 0", "SIMPLE_RADIAL has 4 parameters, not 5"),
        ("cameras", "3 PINHOLE", "expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS"),
        ("images", "1 1 0 x 0 0 0 0 3 a.jpg", "could not convert string to float: 'x'"),
        ("images", "1 1 0 0 0 0 0 0 three a.jpg", "expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"),
        ("images", "1 1 0 0", "images.txt: '1 1 0 0', expected IMAGE_ID"),
    ],
)
def test_a_line_that_is_none_of_colmap_costs_its_scene(file: str, line: str, why: str, tmp_path: Path) -> None:
    tree = TREES["folder_colmap_text"](tmp_path, camera_poses())
    write_text(tmp_path / "wall" / "sparse" / "0" / f"{file}.txt", line)
    assert why in (said := reason(tree))
    assert said.endswith("export the model again")


@pytest.mark.parametrize("change", [{"mask_path": 5}, {"mask_path": ["a.png"]}, {"ply_file_path": 5}])
def test_what_is_no_path_costs_its_scene(change: dict, tmp_path: Path) -> None:
    tree = TREES["folder_nerfstudio"](tmp_path, camera_poses())
    (key,) = change
    change_json(tree.root / "transforms.json", lambda d: (d["frames"][1] if key == "mask_path" else d).update(change))
    assert f"has {key}={change[key]!r}, which is not a path; export it again" in reason(tree)


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_cut_off_models(file: str, tmp_path: Path) -> None:
    tree = TREES["folder_colmap_binary"](tmp_path, camera_poses())
    path = tmp_path / "wall" / "sparse" / file
    data = path.read_bytes()
    for length in range(0, len(data) - (8 if file == "points3D.bin" else 0), 7):
        path.write_bytes(data[:length])
        if file == "points3D.bin":
            with pytest.raises(ValueError, match=r"truncated|no 3D points"):
                read_one(tree).points()
        else:
            assert "damaged" in (why := reason(tree)) or "cut off" in why


def test_a_folder_of_folders(tmp_path: Path) -> None:
    TREES["folder_poses"](tmp_path / "a", camera_poses())
    TREES["folder_nerfstudio"](tmp_path / "b", camera_poses())
    marked = tmp_path / "b" / "wall" / "transforms.json"  # as some programs mark UTF-8
    marked.write_text(marked.read_text(), encoding="utf-8-sig")
    (tmp_path / "a" / "wall").rename(tmp_path / "one")
    (tmp_path / "b" / "wall").rename(tmp_path / "two")
    (tmp_path / "notes").mkdir()
    assert [s.name for s in DATASETS["folder"](tmp_path)] == ["one", "two"]
    assert [s.name for s in DATASETS["folder"](tmp_path, scenes=["two"])] == ["two"]
    assert [s.name for s in DATASETS["folder"](tmp_path, format="poses")] == ["one"]
    with pytest.raises(ValueError, match="known: poses, nerfstudio, colmap"):
        DATASETS["folder"](tmp_path, format="bundler")


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.pop("units"), "no units"),
        (lambda d: d.pop("frames"), "no list of frames"),
        (lambda d: d["frames"][1].pop("extrinsic"), "no 'extrinsic'"),
        (lambda d: d["frames"][1].update(extrinsic=[[1, 2], [3]]), "its matrix is not [3, 4]"),
        (lambda d: d["frames"][1].update(intrinsic=[[0] * 3] * 3), "no positive, finite focal lengths"),
        (lambda d: d["frames"][1].update(width=63), "its intrinsics do not fit"),
    ],
)
def test_damaged_poses_json(change: Callable[[dict], object], why: str, tmp_path: Path) -> None:
    tree = TREES["folder_poses"](tmp_path, camera_poses())
    change_json(tree.root / "poses.json", change)
    assert why in reason(tree)
    (tree.root / "poses.json").write_text("{")
    assert "is not JSON" in reason(tree)


def test_depth_of_other_frames_is_refused(tmp_path: Path) -> None:
    tree = TREES["folder_poses"](tmp_path, camera_poses())
    change_json(tree.root / "poses.json", lambda d: d["frames"].reverse())
    with pytest.raises(ValueError, match="does not belong to the 3 frames"):
        read_one(tree).frames[0].depth()


def test_variants_of_transforms_json(tmp_path: Path) -> None:
    tree = TREES["folder_nerfstudio"](tmp_path, camera_poses())
    path = tree.root / "transforms.json"
    change_json(path, lambda d: [f.update(file_path=f["file_path"].removesuffix(".jpg")) for f in d["frames"]])
    assert read_one(tree).image_paths == tree.images
    change_json(path, lambda d: d["frames"][1].update(fl_x=70, fl_y=71))
    torch.testing.assert_close(read_one(tree).intrinsics[1], pinhole(70, 71, 33.5, 24.5))
    change_json(path, lambda d: d.update(w=65))
    assert "its intrinsics do not fit" in reason(tree)
    for change in ({"k1": 0.1}, {"camera_model": "OPENCV_FISHEYE"}):
        change_json(path, lambda d, change=change: d.update(w=64, k1=0.0, camera_model="OPENCV") or d.update(change))
        assert read_one(tree).intrinsics is None


@pytest.mark.parametrize("name", ["co3d_apple", "dtu_scan24", "strecha_herzjesu_p25"])
def test_points_of_real_photographs_land_on_their_pixels(name: str) -> None:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip("the real scenes are not here")
    (scene,) = DATASETS["folder"](folder)
    with np.load(folder / "sparse.npz") as sparse:
        points, observed = torch.from_numpy(sparse["xyz"]).double(), torch.from_numpy(sparse["obs"]).double()
    distances = []
    for i in range(len(scene.frames)):
        rows = observed[observed[:, 1] == i]
        frame = scene.frames[i]
        pixels, depth = project_points(points[rows[:, 0].long()], frame.intrinsics, frame.cam_from_world)
        assert (depth > 0).all()
        distances.append((pixels - (rows[:, 2:] + 0.5)).norm(dim=-1))
    assert torch.cat(distances).median() < 0.3
    assert scene.points().shape == points.shape


def test_depth_of_a_real_room_agrees_between_frames() -> None:
    folder = SHARED_DATA / "7scenes_redkitchen"
    if not folder.is_dir():
        pytest.skip("the real scenes are not here")
    (scene,) = DATASETS["folder"](folder)
    first, second = scene.frames[0], scene.frames[1]
    points = unproject_depth(first.depth().double(), first.intrinsics, first.cam_from_world)[first.depth() > 0]
    pixels, depth = project_points(points, second.intrinsics, second.cam_from_world)
    u, v = pixels.floor().long().unbind(-1)
    inside = (u >= 0) & (u < 518) & (v >= 0) & (v < 388) & (depth > 0)
    measured = second.depth()[v[inside], u[inside]].double()
    relative = (measured / depth[inside] - 1)[measured > 0]
    assert relative.abs().median() < 0.015
    assert relative.median().abs() < 0.005
