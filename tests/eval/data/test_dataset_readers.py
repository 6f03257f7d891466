"""Every reader on a small tree in the official layout: poses, intrinsics, depth, and what it does with bad data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_trees import TREES
from tree_parts import WALL_NORMAL, WALL_OFFSET, Tree, camera_poses, write_photograph, write_text

from geoaccel.cameras import unproject_depth
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalScene, Skipped

WITH_DEPTH = ["seven_scenes", "neural_rgbd", "dtu", "scannet", "eth3d", "tum_rgbd", "co3d", "folder_poses"]
WITH_POINTS = ["dtu", "scannet", "co3d", "folder_poses", "folder_nerfstudio", "folder_colmap_text"]
WITH_POINTS += ["folder_colmap_binary"]


def scenes_of(tree: Tree, **options: Any) -> tuple[list[EvalScene], list[Skipped]]:
    skipped: list[Skipped] = []
    found = list(DATASETS[tree.dataset](tree.root, on_skip=skipped.append, **{**tree.options, **options}))
    return found, skipped


def scene_of(tree: Tree, **options: Any) -> EvalScene:
    (scene,), skipped = scenes_of(tree, **options)
    assert not skipped
    return scene


def skip_of(tree: Tree, **options: Any) -> str:
    found, (skipped,) = scenes_of(tree, **options)
    assert not found
    assert skipped.name == tree.scene
    assert "\n" not in skipped.reason
    return skipped.reason


@pytest.fixture(params=TREES)
def writer(request: pytest.FixtureRequest) -> Callable[[Path, torch.Tensor], Tree]:
    return TREES[request.param]


def test_what_was_written_comes_back(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    poses = camera_poses()
    tree = writer(tmp_path, poses)
    scene = scene_of(tree)
    assert scene.name == tree.scene
    assert not scene.dropped
    assert scene.image_paths == tree.images
    torch.testing.assert_close(scene.cam_from_world, poses, atol=1e-8, rtol=0)
    if tree.intrinsics is None:
        assert scene.intrinsics is None
    else:
        torch.testing.assert_close(scene.intrinsics, tree.intrinsics.expand(3, 3, 3), atol=1e-6, rtol=0)
    images = scene.images()
    assert images.shape == (3, 3, *tree.size)
    # the right photograph to the right pose: they are ever more red
    assert torch.allclose(images[:, 0].mean(dim=(1, 2)), torch.tensor([0.0, 40, 80]) / 255, atol=0.02)


def test_scenes_travel_to_other_processes(
    writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tree = writer(tmp_path, camera_poses())
    scene = pickle.loads(pickle.dumps(scene_of(tree)))
    assert scene.frames[1].image().shape == (3, *tree.size)
    depth = scene.frames[1].depth()
    assert (depth is not None) == (request.node.callspec.params["writer"] in WITH_DEPTH)


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_depth_lies_on_the_wall(name: str, tmp_path: Path) -> None:
    """Scale of depth, direction of poses and half pixels, all at once."""
    tree = TREES[name](tmp_path, camera_poses())
    scene = scene_of(tree)
    depth = scene.depth()
    assert depth is not None
    assert depth.dtype == torch.float32
    assert (depth > 0).float().mean() > 0.9
    points = unproject_depth(depth.double(), scene.intrinsics, scene.cam_from_world)
    off = (points @ WALL_NORMAL - WALL_OFFSET).abs()[depth > 0]
    assert off.quantile(0.99) < tree.tolerance
    assert off.median() < tree.tolerance / 2


@pytest.mark.parametrize("name", WITH_POINTS)
def test_points(name: str, tmp_path: Path) -> None:
    assert torch.equal(scene_of(TREES[name](tmp_path, camera_poses())).points(), torch.eye(3))


def test_choice_of_scenes(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    tree = writer(tmp_path, camera_poses())
    assert scene_of(tree, scenes=[tree.scene]).name == tree.scene
    with pytest.raises(ValueError, match="unknown scene 'nothing'; known: "):
        scenes_of(tree, scenes=["nothing"])


def test_no_dataset_there(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    tree = writer(tmp_path / "full", camera_poses())
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere", None):
        with pytest.raises(FileNotFoundError, match="no "):
            list(DATASETS[tree.dataset](root))


def test_one_frame_is_no_sequence(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    assert "1 usable frame(s), at least 2" in skip_of(writer(tmp_path, camera_poses(1)))


def test_frames_without_a_pose(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    poses = camera_poses()
    poses[1] = torch.nan
    tree = writer(tmp_path / "one", poses)
    if tree.dataset == "co3d":  # CO3D has no gaps: such a sequence is damaged
        assert "not a camera" in skip_of(tree)
        return
    scene = scene_of(tree)
    torch.testing.assert_close(scene.cam_from_world, poses[[0, 2]], atol=1e-8, rtol=0)
    assert [str(d.reason) for d in scene.dropped] == ["the pose is NaN or infinite"]
    poses[2] = torch.nan
    assert "1 usable frame(s)" in skip_of(writer(tmp_path / "two", poses))


def test_a_missing_photograph(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    tree = writer(tmp_path, camera_poses())
    tree.images[1].unlink()
    if tree.can_be_partial:
        scene = scene_of(tree)
        torch.testing.assert_close(scene.cam_from_world, camera_poses()[[0, 2]], atol=1e-8, rtol=0)
    else:
        assert any(word in skip_of(tree) for word in ("no file", "no frame", "2 images and 3 poses"))


@pytest.mark.parametrize("name", [name for name in WITH_DEPTH if name not in ("folder_poses", "co3d")])
def test_a_missing_depth_map(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path, camera_poses())
    tree.depths[1].unlink()
    assert f"no file {tree.depths[1]}" in skip_of(tree)


def test_a_photograph_that_does_not_decode(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    tree = writer(tmp_path, camera_poses())
    tree.images[1].write_bytes(b"GIF89a, but not really")
    found, skipped = scenes_of(tree)
    if found:
        with pytest.raises(ValueError, match=tree.images[1].name) as error:
            found[0].images()
        assert "\n" not in str(error.value)
    else:
        assert tree.images[1].name in skipped[0].reason


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_depth_that_is_damaged_or_empty(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path, camera_poses())
    for path in tree.depths or [tree.root / "depth.npz"]:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"damaged|not a readable|has no depth_mm|not an array|holds"):
        scene_of(tree).depth()
    tree = TREES[name](tmp_path / "empty", camera_poses())
    for path in tree.depths:
        if path.suffix == ".npy":
            np.save(path, np.full(tree.size, np.nan, dtype=np.float32))
        elif path.suffix == ".JPG":
            np.full((48, 64), np.inf, dtype=np.float32).tofile(path)
        else:
            from PIL import Image

            with Image.open(path) as image:
                size = image.size
            Image.fromarray(np.zeros(size[::-1], dtype=np.uint16)).save(path)
    if not tree.depths:
        names = np.array([path.name for path in tree.images])
        np.savez(tree.root / "depth.npz", depth_mm=np.zeros((3, *tree.size), dtype=np.uint16), files=names)
        from geoaccel.eval.data import folder

        folder._npz_depth.cache_clear()
    with pytest.raises(ValueError, match="no pixel of any depth map is known"):
        scene_of(tree).depth()


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize("name", ["folder_poses", "dtu"])
def test_arrays_that_are_cut_off_or_of_another_kind(name: str, kept: float, tmp_path: Path) -> None:
    """Half a download is no zip file any more: one line, so that the run goes on with the next scene."""
    tree = TREES[name](tmp_path, camera_poses())
    path = (tree.depths or [tree.root / "depth.npz"])[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=rf"{path.name} (has no depth_mm|is not an array) .*again") as error:
        scene_of(tree).depth()
    assert "\n" not in str(error.value)
    path.write_bytes(b"PK\x03\x04 and no archive")
    with pytest.raises(ValueError, match=rf"{path.name} (has no depth_mm|is not an array)"):
        scene_of(tree).depth()


def test_a_whole_archive_with_damaged_bytes(tmp_path: Path) -> None:
    tree = TREES["folder_poses"](tmp_path, camera_poses())
    path = tree.root / "depth.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"depth\.npz has no depth_mm \(Bad CRC-32"):
        scene_of(tree).depth()


def test_a_category_without_annotations_costs_no_other(tmp_path: Path) -> None:
    tree = TREES["co3d"](tmp_path, camera_poses())
    for category in ("banana", "cake"):
        (tmp_path / category).mkdir()
        (tmp_path / category / "frame_annotations.jgz").write_bytes(b"no gzip")
    (tmp_path / "banana" / "sequence_annotations.jgz").write_bytes(b"no gzip")
    found, skipped = scenes_of(tree)
    assert [scene.name for scene in found] == [tree.scene]
    assert [s.name for s in skipped] == ["banana", "cake"]
    assert "sequence_annotations.jgz is not gzipped JSON" in skipped[0].reason
    assert "no file" in skipped[1].reason
    # Where there is nothing else the reason is the error.
    with pytest.raises(FileNotFoundError, match=r"cake.sequence_annotations\.jgz"):
        scenes_of(tree, scenes=["cake"])
    with pytest.raises(FileNotFoundError, match="subsets of apple: fewview_dev"):
        scenes_of(tree, subset="fewview_tset")


def test_options_that_a_reader_has_not(writer: Callable[[Path, torch.Tensor], Tree], tmp_path: Path) -> None:
    tree = writer(tmp_path, camera_poses())
    with pytest.raises(ValueError, match="unknown data option 'typo'; known: ") as error:
        scenes_of(tree, typo=1)
    assert not {"root", "scenes", "on_skip"} & set(str(error.value).split("known: ")[1].split(", "))


def test_options_of_the_wrong_kind() -> None:
    synthetic = DATASETS["synthetic"]
    with pytest.raises(ValueError, match=r"unknown data option 'sizes'; known: seeds, size\. Did you mean 'size'"):
        synthetic(None, sizes=[28, 28])
    for size in (224, [224], [224, 0], [28, 28, 3], "28", [28.5, 28], None):
        with pytest.raises(ValueError, match=r"size=.*: give height and width in pixels, such as \[224, 224\]"):
            synthetic(None, size=size)
    for seeds in (3, [], ["3"], [-1]):
        with pytest.raises(ValueError, match=r"seeds=.*: give a list of whole numbers"):
            synthetic(None, seeds=seeds)


def test_a_root_that_is_named_by_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``data.root=2024`` reaches the reader as a number."""
    tree = TREES["dtu"](tmp_path / "2024", camera_poses())
    monkeypatch.chdir(tmp_path)
    assert [scene.name for scene in DATASETS["dtu"](2024)] == [tree.scene]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["neural_rgbd", "seven_scenes", "tum_rgbd", "dtu"])
def test_depth_of_another_size(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path, camera_poses())
    write_photograph(tree.images[0], (tree.size[0] - 1, tree.size[1]))
    frame = scene_of(tree).frames[0]
    with pytest.raises(ValueError, match=r"resize them to the same size|holds"):
        frame.depth()


def test_photographs_turned_by_exif_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    tree = TREES["folder_poses"](tmp_path, camera_poses())
    exif = Image.Exif()
    exif[0x0112] = 6
    write_photograph(tree.images[1], tree.size, exif=exif)
    assert "EXIF orientation" in skip_of(tree)


def test_empty_and_damaged_clouds(tmp_path: Path) -> None:
    tree = TREES["folder_poses"](tmp_path, camera_poses())
    write_text(tree.root / "points.ply", "no ply")
    with pytest.raises(ValueError, match=r"points\.ply is not a point cloud"):
        scene_of(tree).points()


def test_unknown_dataset() -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'scanet'.*Did you mean 'scannet'"):
        DATASETS["scanet"]


def test_synthetic_scenes() -> None:
    options = {"seeds": (3, 4), "num_frames": 3, "size": (28, 42)}
    scenes = list(DATASETS["synthetic"](None, **options))
    assert [scene.name for scene in scenes] == ["seed000000003", "seed000000004"]
    for scene in scenes:  # the first is rendered again: the second has been since
        again = pickle.loads(pickle.dumps(scene))
        assert scene.images().shape == (3, 3, 28, 42)
        assert scene.image_paths == []
        assert scene.frames[0].size() == (28, 42)
        assert scene.frames[2].mask().any()
        depth = again.depth()
        points = unproject_depth(depth.double(), scene.intrinsics, scene.cam_from_world)[depth > 0]
        assert torch.allclose(points, scene.points().double(), atol=1e-3)
    assert [s.name for s in DATASETS["synthetic"](None, scenes="seed000000004", **options)] == ["seed000000004"]
