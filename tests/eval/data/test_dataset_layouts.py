"""What is special about single datasets."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import LENS, TREES
from PIL import Image
from reading import read_one, reason
from tree_parts import (
    WALL_NORMAL,
    WALL_OFFSET,
    Tree,
    camera_poses,
    pinhole,
    wall_depth,
    write_depth_png,
    write_photograph,
    write_text,
)

from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data import colmap_model, dtu, scannet, seven_scenes
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import Skipped
from geoaccel.eval.metrics.geometry import rotation_angle_deg


def test_skips_are_logged_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = TREES["dtu"](tmp_path, camera_poses(1))
    with caplog.at_level(logging.WARNING):
        assert not list(DATASETS["dtu"](tree.root))
    assert "skipped scan24: 1 usable frame(s)" in caplog.text


# 7-Scenes


def test_raw_depth_of_seven_scenes_reaches_the_color_camera(tmp_path: Path) -> None:
    color = camera_poses(2)
    tree = TREES["seven_scenes"](tmp_path, color)
    from_color = invert_rigid(seven_scenes.COLOR_FROM_DEPTH)
    for path, pose in zip(tree.depths, color, strict=True):
        path.unlink()
        raw = wall_depth(pinhole(585, 585, 320, 240), from_color @ pose, tree.size)
        raw[:20] = 65.535  # unknown
        write_depth_png(path.with_name(path.name.replace(".proj", "")), raw, 1000)
        stem = path.name.removesuffix(".depth.proj.png")
        write_text(path.with_name(f"{stem}.pose.txt"), *invert_rigid(from_color @ pose))
    published, scene = read_one(tree), read_one(tree, poses="color")
    torch.testing.assert_close(published.cam_from_world, from_color @ color, atol=1e-6, rtol=0)
    torch.testing.assert_close(scene.cam_from_world, color, atol=1e-6, rtol=0)
    depth = scene.depth()
    known = depth > 0
    assert 0.6 < known.float().mean() < 0.99  # one reading a pixel of a finer grid, nothing in the unknown band
    points = unproject_depth(depth.double(), scene.intrinsics, scene.cam_from_world)
    off = (points @ WALL_NORMAL - WALL_OFFSET)[known]
    assert off.abs().quantile(0.99) < 4e-3
    assert off.median().abs() < 5e-4


def test_calibration_of_seven_scenes() -> None:
    """The colour camera is 2.56 cm to the right of the depth camera and turned by two thirds of a degree."""
    matrix = seven_scenes.COLOR_FROM_DEPTH
    assert invert_rigid(matrix)[:3, 3].tolist() == pytest.approx([0.0255, 0.0, -0.0022], abs=1e-4)
    assert torch.allclose(matrix[:3, :3] @ matrix[:3, :3].T, torch.eye(3).double(), atol=1e-6)
    assert rotation_angle_deg(matrix[:3, :3], torch.eye(3)).item() == pytest.approx(0.669, abs=0.01)


def test_splits_of_seven_scenes(tmp_path: Path) -> None:
    tree = TREES["seven_scenes"](tmp_path, camera_poses(2))
    assert "unpack seq-01.zip" in reason(tree, split="train")
    assert len(list(DATASETS["seven_scenes"](tree.root, split="all"))) == 1
    with pytest.raises(ValueError, match="known: train, test, all"):
        DATASETS["seven_scenes"](tree.root, split="val")
    assert [s.name for s in DATASETS["seven_scenes"](tree.root, scenes=["chess"])] == ["chess_seq-03"]


def test_far_and_unknown_depth_of_seven_scenes(tmp_path: Path) -> None:
    tree = TREES["seven_scenes"](tmp_path, camera_poses(2))
    stored = np.full(tree.size, 2000, dtype=np.uint16)
    stored[0, :4] = [0, 65535, 10_001, 10_000]
    Image.fromarray(stored).save(tree.depths[0])
    assert read_one(tree).frames[0].depth()[0, :5].tolist() == [0.0, 0.0, 0.0, 10.0, 2.0]


# Neural RGB-D, DTU


def test_neural_rgbd_is_ordered_by_number(tmp_path: Path) -> None:
    poses = camera_poses(12)
    scene = read_one(TREES["neural_rgbd"](tmp_path, poses))
    assert [frame.name for frame in scene.frames] == [f"img{i}" for i in range(12)]
    torch.testing.assert_close(scene.cam_from_world, poses, atol=1e-8, rtol=0)
    write_text(tmp_path / "kitchen" / "poses.txt", "1 0 0 0", "0 1 0")
    assert "does not consist of 4 x 4 matrices" in reason(Tree("neural_rgbd", tmp_path, "kitchen", None, (48, 64)))


def test_cameras_of_dtu(tmp_path: Path) -> None:
    tree = TREES["dtu"](tmp_path, camera_poses(2))
    camera = tmp_path / "scan24" / "cams" / "00000001_cam.txt"
    text = camera.read_text()
    camera.write_text(text.replace("33.0", "8.0"))  # as it is for images of a quarter of the size
    assert "does not belong to an image of 64 x 48 pixels" in reason(tree)
    camera.write_text(text.replace("intrinsic", "intr"))
    assert "is not an MVSNet camera" in reason(tree)
    camera.write_text(text)
    assert len(dtu.TEST_SCANS) == 22
    skipped: list[Skipped] = []
    assert [s.name for s in dtu.read(tmp_path, split="test", on_skip=skipped.append)] == ["scan24"]
    assert len(skipped) == 21


def test_depth_of_dtu_counts_inside_the_mask(tmp_path: Path) -> None:
    tree = TREES["dtu"](tmp_path, camera_poses(2))
    half = np.zeros(tree.size, dtype=np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(tmp_path / "scan24" / "binary_masks" / "00000000.png")
    frame = read_one(tree).frames[0]
    assert torch.equal(frame.depth() > 0, frame.mask())
    assert frame.mask().sum() == half.size // 2


def test_mask_and_plane_of_dtu(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    tree = TREES["dtu"](tmp_path, camera_poses(2))
    assert read_one(tree).region() is None
    mask = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    box, plane = [[-1.0, -2, -3], [2, 2, 2.5]], [[0.0], [0.1], [0.9], [-7]]
    folder = tmp_path / "ObsMask"
    folder.mkdir()
    held = {"ObsMask": mask.numpy().astype(np.uint8), "BB": np.array(box), "Res": np.array([[0.5]])}
    scipy_io.savemat(folder / "ObsMask24_10.mat", held)
    assert read_one(tree).region() is None  # the plane is missing
    scipy_io.savemat(folder / "Plane24.mat", {"P": np.array(plane)})
    region = pickle.loads(pickle.dumps(read_one(tree))).region()
    assert torch.equal(region.mask, mask)
    assert (region.box.tolist(), region.cell) == (box, 0.5)
    assert region.ground_plane.tolist() == [row[0] for row in plane]
    for change, message in (({"Res": -1.0}, "a positive Res"), ({"BB": np.zeros(3)}, "lacks a mask"), ({}, "ObsMask")):
        scipy_io.savemat(folder / "ObsMask24_10.mat", {**held, **change} if change else {"BB": np.array(box)})
        with pytest.raises(ValueError, match=message):
            read_one(tree).region()
    scipy_io.savemat(folder / "ObsMask24_10.mat", held)
    (folder / "Plane24.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="does not hold P") as error:
        read_one(tree).region()
    assert "\n" not in str(error.value)


# ScanNet


def test_depth_of_scannet_is_the_nearest_reading(tmp_path: Path) -> None:
    stored = torch.arange(1, 13, dtype=torch.float64).view(3, 4)
    path = write_depth_png(tmp_path / "0.png", stored, 1000)
    same = scannet._read_depth(path, pinhole(5, 5, 2, 1.5), pinhole(5, 5, 2, 1.5), (3, 4))
    assert torch.equal(same, stored.float())
    twice = scannet._read_depth(path, pinhole(5, 5, 2, 1.5), pinhole(10, 10, 4, 3), (6, 8))
    assert torch.equal(twice, stored.float().repeat_interleave(2, 0).repeat_interleave(2, 1))
    wider = scannet._read_depth(path, pinhole(5, 5, 2, 1.5), pinhole(5, 5, 3, 2.5), (5, 6))
    assert torch.equal(wider, torch.nn.functional.pad(stored.float(), (1, 1, 1, 1)))


def test_calibration_of_scannet(tmp_path: Path) -> None:
    tree = TREES["scannet"](tmp_path, camera_poses(2))
    moved = torch.eye(4)
    moved[0, 3] = 0.02
    write_text(tmp_path / "scene0000_00" / "intrinsic" / "extrinsic_color.txt", *moved)
    assert "are not aligned" in reason(tree)


def test_fifty_of_scannet(tmp_path: Path) -> None:
    for i in range(120):
        (tmp_path / f"scene{i:04d}_00" / "pose").mkdir(parents=True)
    skipped: list[Skipped] = []
    assert not list(scannet.read(tmp_path, fifty=True, on_skip=skipped.append))
    assert [s.name for s in skipped] == [f"scene{2 * i:04d}_00" for i in range(50)]


# TUM RGB-D, RealEstate10K


def test_gaps_of_tum(tmp_path: Path) -> None:
    tree = TREES["tum_rgbd"](tmp_path, camera_poses(4))
    folder = tmp_path / tree.scene
    for name, row in (("groundtruth", 4), ("depth", 3)):  # the pose of frame 1, the depth map of frame 2
        rows = (folder / f"{name}.txt").read_text().splitlines()
        del rows[row]
        write_text(folder / f"{name}.txt", *rows)
    scene = read_one(tree)
    torch.testing.assert_close(scene.cam_from_world, camera_poses(4)[[0, 3]], atol=1e-8, rtol=0)
    assert [d.reason for d in scene.dropped] == ["no pose within 0.02 s", "no depth map within 0.02 s"]
    assert len(read_one(tree, depth=False).frames) == 3
    folder.rename(tmp_path / "rgbd_dataset_freiburg1_desk")
    assert read_one(tree).intrinsics is None
    write_text(tmp_path / "rgbd_dataset_freiburg1_desk" / "rgb.txt", "one rgb/1.png")
    assert "not begin with a timestamp" in reason(tree)


def test_frames_of_realestate_by_number(tmp_path: Path) -> None:
    tree = TREES["realestate10k"](tmp_path, camera_poses())
    by_number = tmp_path / "by_number"
    (by_number / "metadata" / "test").mkdir(parents=True)
    (tmp_path / "test" / f"{tree.scene}.txt").rename(by_number / "metadata" / "test" / f"{tree.scene}.txt")
    for i in range(3):
        write_photograph(by_number / tree.scene / "images" / f"{i:04d}.png", tree.size, i)
    (scene,) = DATASETS["realestate10k"](by_number)
    torch.testing.assert_close(scene.cam_from_world, camera_poses(), atol=1e-8, rtol=0)
    torch.testing.assert_close(scene.intrinsics[0], tree.intrinsics)
    path = by_number / "metadata" / "test" / f"{tree.scene}.txt"
    path.write_text(path.read_text().replace(" 0.0 0.0 ", " 0.0 "))
    assert "expected 19 numbers" in reason(Tree("realestate10k", by_number, tree.scene, None, tree.size))


# ETH3D and COLMAP


def test_the_lens_of_eth3d_is_colmaps() -> None:
    pycolmap = pytest.importorskip("pycolmap")
    camera = pycolmap.Camera(model="THIN_PRISM_FISHEYE", width=64, height=48, params=list(LENS))
    rays = np.random.default_rng(0).uniform(-0.7, 0.7, (50, 2))
    points = np.concatenate([rays, np.ones((50, 1))], axis=-1)
    expected = np.asarray(camera.img_from_cam(points))
    np.testing.assert_allclose(colmap_model.thin_prism_fisheye_pixels(rays, LENS), expected, atol=1e-9)


def test_scans_of_eth3d_are_moved_into_the_world(tmp_path: Path) -> None:
    tree = TREES["eth3d"](tmp_path, camera_poses(2))
    assert torch.equal(read_one(tree).points(), torch.eye(3) + torch.tensor([10.0, 20.0, 30.0]))
    project = tmp_path / "courtyard" / "dslr_scan_eval" / "scan_alignment.mlp"
    for text in (project.read_text().replace("<MLMatrix44>", "<MLMatrix44>x "), "<open"):
        project.write_text(text)
        with pytest.raises(UserError, match="is not a MeshLab project"):
            read_one(tree).points()


def test_depth_of_eth3d_needs_the_lens(tmp_path: Path) -> None:
    tree = TREES["eth3d"](tmp_path, camera_poses(2))
    (tmp_path / "courtyard" / "dslr_calibration_jpg").rename(tmp_path / "elsewhere")
    assert read_one(tree).depth() is None


# folders


def test_choice_of_co3d(tmp_path: Path) -> None:
    tree = TREES["co3d"](tmp_path, camera_poses())
    (scene,) = DATASETS["co3d"](tmp_path, scenes=["apple"], subset="fewview_dev", split="test")
    assert (scene.name, scene.category) == (tree.scene, "apple")
    path = tmp_path / "apple" / "sequence_annotations.jgz"
    (annotation,) = json.loads(gzip.decompress(path.read_bytes()))
    for quality, kept in ((0.6, True), (0.5, False), (None, False)):
        changed = json.dumps([{**annotation, "viewpoint_quality_score": quality}])
        path.write_bytes(gzip.compress(changed.encode()))
        skipped: list[Skipped] = []
        found = list(DATASETS["co3d"](tmp_path, min_quality=0.5, on_skip=skipped.append))
        assert (len(found), len(skipped)) == (kept, not kept)
        assert len(list(DATASETS["co3d"](tmp_path))) == 1
    with pytest.raises(ValueError, match="min_quality='high': give a number"):
        DATASETS["co3d"](tmp_path, min_quality="high")
    with pytest.raises(ValueError, match="unknown scene 'apple_1'"):
        list(DATASETS["co3d"](tmp_path, scenes=["apple_1"]))
    with pytest.raises(ValueError, match="give subset"):
        DATASETS["co3d"](tmp_path, split="test")


# KITTI odometry


def test_poses_of_kitti_are_moved_to_the_camera_that_took_the_photographs(tmp_path: Path) -> None:
    poses = camera_poses()
    tree = TREES["kitti_odometry"](tmp_path, poses)
    assert read_one(tree).frames[0].image_path == tree.images[0]
    folder = tmp_path / "sequences" / "04"
    (folder / "image_2").rename(folder / "image_0")
    grey = read_one(tree)
    assert grey.frames[0].image_path == folder / "image_0" / "000000.png"
    shift = poses[:, :3, 3] - grey.cam_from_world[:, :3, 3]
    torch.testing.assert_close(shift, torch.tensor([[0.06, -0.001, 0.002]]).double().expand(3, 3), atol=1e-8, rtol=0)
    torch.testing.assert_close(grey.cam_from_world[:, :3, :3], poses[:, :3, :3], atol=1e-8, rtol=0)


def test_sequences_of_kitti_without_truth_are_said_to_be(tmp_path: Path) -> None:
    tree = TREES["kitti_odometry"](tmp_path, camera_poses())
    (tmp_path / "sequences" / "04").rename(tmp_path / "sequences" / "11")
    with pytest.raises(ValueError, match="holds none of 00 to 10: KITTI publishes no poses of sequences 11 to 21"):
        DATASETS["kitti_odometry"](tmp_path)
    TREES["kitti_odometry"](tmp_path, camera_poses())
    assert [scene.name for scene in DATASETS["kitti_odometry"](tmp_path)] == ["04"]
    with pytest.raises(ValueError, match="sequence 11: KITTI publishes no poses") as error:
        DATASETS["kitti_odometry"](tmp_path, scenes=["04", "11"])
    assert "\n" not in str(error.value)
    for text, why in (
        ("1 2 3", "twelve numbers per line"),
        ("", "3 images and 0 poses"),
        ("word", "twelve numbers per line"),
    ):
        write_text(tmp_path / "poses" / "04.txt", text)
        assert why in reason(tree)
    (tmp_path / "poses" / "04.txt").unlink()
    assert "no file" in reason(tree)
    (tmp_path / "poses").rmdir()
    with pytest.raises(FileNotFoundError, match="fetch the ground truth poses"):
        DATASETS["kitti_odometry"](tmp_path)


@pytest.mark.parametrize(
    ("line", "why"), [("P1: 1", "no line P2"), ("P2: 1 2", "twelve"), ("P2: " + 12 * "0 ", "focal")]
)
def test_calibration_of_kitti_that_is_none(line: str, why: str, tmp_path: Path) -> None:
    tree = TREES["kitti_odometry"](tmp_path, camera_poses())
    write_text(tmp_path / "sequences" / "04" / "calib.txt", line)
    assert why in reason(tree)
