"""Depth, confidence, masks, trajectories and meshes: read again by what people read them with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from analytic_scene import RADIUS, SPHERE, WALL_Z, load
from export_scenes import checked_memory, scene, small  # noqa: F401 (fixtures)
from PIL import Image

from geoaccel.cameras import invert_rigid
from geoaccel.errors import MissingPackage
from geoaccel.eval.data.colmap_model import rotation_from_quaternion
from geoaccel.export import maps, mesh, read_formats
from geoaccel.export.formats import NEEDS
from geoaccel.images import load_conditions, load_masks
from geoaccel.open3d_loader import load_open3d
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


def test_depth_of_16_bits_is_read_again(scene: Any, tmp_path: Path) -> None:
    scene.save(tmp_path / "out", "nerfstudio,depth")
    for i, name in enumerate(scene.names):
        with Image.open(tmp_path / "out" / "depth" / name) as file:
            assert file.mode.startswith("I;16")
            steps = np.asarray(file).astype(float)
        np.testing.assert_allclose(steps / 1000, scene.original_depth(i), atol=0.0006)
    said = json.loads((tmp_path / "out" / "depth" / "scale.json").read_text())
    assert said == {"steps_per_unit": 1000.0, "unit": "arbitrary"}
    frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
    assert [frame["depth_file_path"] for frame in frames] == [f"depth/{name}" for name in scene.names]
    # By our own reader, which takes 0 for unknown.
    read = load_conditions(scene, depths=tmp_path / "out" / "depth").depths
    known = read > 0
    assert known.float().mean() > 0.5 * scene.mask.float().mean()
    assert (read - scene.depth)[known & scene.mask].abs().median() < 0.02


def test_far_depth_has_coarser_steps(small: Any, tmp_path: Path) -> None:
    far = replace(small, depth=small.depth * 300)
    far.save(tmp_path / "out", "depth,nerfstudio")
    steps = json.loads((tmp_path / "out" / "depth" / "scale.json").read_text())["steps_per_unit"]
    assert steps == 10
    with Image.open(tmp_path / "out" / "depth" / "frame_0000.png") as file:
        np.testing.assert_allclose(np.asarray(file) / steps, far.original_depth(0), atol=0.051)
    read = load_conditions(far, depths=tmp_path / "out" / "depth").depths
    assert read is not None
    torch.testing.assert_close(read[far.mask], far.depth[far.mask], atol=0.051, rtol=0)
    # Nerfstudio would take them for thousandths.
    assert "depth_file_path" not in (tmp_path / "out" / "transforms.json").read_text()


@pytest.mark.parametrize(("share", "steps"), [(0.1, 1e3), (0.002, 1e6), (0.0, 1e3)])
def test_near_depth_has_finer_steps_where_it_would_be_terraces(
    share: float, steps: float, small: Any, tmp_path: Path
) -> None:
    near = replace(small, depth=(small.depth / small.depth.max() * 10 * share), unit="metre")
    near.save(tmp_path / "out", "depth")
    assert json.loads((tmp_path / "out" / "depth" / "scale.json").read_text())["steps_per_unit"] == steps
    read = load_conditions(near, depths=tmp_path / "out" / "depth").depths
    torch.testing.assert_close(read[near.mask], near.depth[near.mask], atol=0.51 / steps, rtol=1e-6)


def test_depth_in_exr_is_exact(scene: Any, tmp_path: Path) -> None:
    exr = pytest.importorskip("OpenEXR")
    replace(scene, unit="metre").save(tmp_path / "out", "depth-exr")
    for i, name in enumerate(scene.names):
        with exr.File(str(tmp_path / "out" / "depth-exr" / Path(name).with_suffix(".exr"))) as file:
            np.testing.assert_array_equal(file.channels()["Z"].pixels, scene.original_depth(i))
            assert file.header()["unit"] == "metre"


def test_confidence_is_the_rank_in_the_scene(scene: Any, tmp_path: Path) -> None:
    scene.save(tmp_path / "out", "confidence")
    surest = []
    for i, transform in enumerate(scene.transforms):
        with Image.open(tmp_path / "out" / "confidence" / scene.names[i]) as file:
            assert file.mode == "L"
            values = np.asarray(file)
        assert values.shape == transform.original_size
        seen = transform.seen_mask().numpy()
        assert (values[~seen] == 0).all()
        surest.append(values[seen].max())
        back = transform.nearest(torch.from_numpy(values.copy()).float())
        everything = scene.conf[scene.mask].sort().values
        rank = torch.searchsorted(everything, scene.conf[i][scene.mask[i]], right=True) / len(everything)
        off = (back[scene.mask[i]] - (1 + 254 * rank)).abs()
        assert off.median() <= 0.5
        assert (off < 2).float().mean() > 0.9
    assert max(surest) == 255


def test_maps_of_images_that_differ_in_their_suffix(small: Any, tmp_path: Path) -> None:
    small.names[:] = ["a.jpg", "a.png"]
    small.save(tmp_path / "out", "depth")
    assert sorted(p.name for p in (tmp_path / "out" / "depth").glob("*.png")) == ["a.jpg.png", "a.png.png"]
    assert load_conditions(small, depths=tmp_path / "out" / "depth").depths is not None
    (tmp_path / "out" / "depth" / "a.jpg.png").rename(tmp_path / "out" / "depth" / "a.npy")
    with pytest.raises(ValueError, match=r"a.npy may belong to a.jpg or a.png; .* such as .*/a.jpg.npy"):
        load_conditions(small, depths=tmp_path / "out" / "depth")


def test_each_image_has_a_map_of_its_own(small: Any, tmp_path: Path) -> None:
    """With its suffix one of two would have the name of a third without it."""
    three = small.of_frames([0, 1, 0])
    three.names[:] = ["a.jpg", "a.png", "a.jpg.jpg"]
    three.depth[2] *= 0.5
    three.save(tmp_path / "out", "depth")
    written = sorted(p.name for p in (tmp_path / "out" / "depth").glob("*.png"))
    assert written == ["a.jpg.jpg.png", "a.jpg.png", "a.png.png"]
    read = load_conditions(three, depths=tmp_path / "out" / "depth").depths
    torch.testing.assert_close(read[three.mask], three.depth[three.mask], atol=6e-4, rtol=0)


def test_masks_come_along_as_nerfstudio_reads_them(tmp_path: Path) -> None:
    batch, model = load(tmp_path / "photos", "pad")
    (tmp_path / "masks").mkdir()
    for i, path in enumerate(batch.paths):
        height, width = batch.transforms[i].original_size
        mask = np.zeros((height, width, 3), np.uint8)  # of three channels, which nerfstudio refuses
        mask[:, : width // 2] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    result = reconstruct(batch, model=model, masks=tmp_path / "masks")
    assert torch.equal(result.selected, load_masks(tmp_path / "masks", batch))
    cloud = result.save(tmp_path / "out", "nerfstudio,ply", conf_percentile=0)
    widths = torch.tensor([t.original_size[1] for t in result.transforms])
    assert (cloud.pixels[:, 0] <= widths[cloud.frame] / 2 + 1).all()
    for i, frame in enumerate(json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]):
        assert frame["mask_path"] == f"masks/{result.names[i]}.png"  # where COLMAP looks, too
        with Image.open(tmp_path / "out" / frame["mask_path"]) as file:
            assert file.mode == "L"
            values = np.asarray(file)
        assert values.shape == result.transforms[i].original_size
        assert values[:, 0].min() == 255
        assert values[:, -1].max() == 0


def test_a_mask_given_to_save_reaches_maps_and_masks(tmp_path: Path) -> None:
    """By itself, and on top of the masks of files."""
    batch, model = load(tmp_path / "photos", "stretch")
    (tmp_path / "masks").mkdir()
    for i, path in enumerate(batch.paths):
        mask = np.zeros(batch.transforms[i].original_size, np.uint8)
        mask[: mask.shape[0] // 2] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    left = torch.zeros(batch.images[:, 0].shape, dtype=torch.bool)
    left[:, :, : left.shape[2] // 2] = True
    for folder in (None, tmp_path / "masks"):
        result = reconstruct(batch, model=model, masks=folder)
        out = tmp_path / ("both" if folder else "one")
        result.save(out, "depth,confidence,nerfstudio", mask=left, tracks="project")
        for i, frame in enumerate(json.loads((out / "transforms.json").read_text())["frames"]):
            height, width = result.transforms[i].original_size
            for file in (frame["mask_path"], f"depth/{result.names[i]}", f"confidence/{result.names[i]}"):
                with Image.open(out / file) as picture:
                    values = np.asarray(picture)
                assert values[: height // 2 - 2, : width // 2 - 2].any(), file
                assert not values[:, width // 2 + 2 :].any(), file
                assert values[height // 2 + 2 :].any() == (folder is None), file


def test_a_trajectory_in_the_format_of_tum(scene: Any, tmp_path: Path) -> None:
    scene.save(tmp_path / "out", "tum")
    lines = (tmp_path / "out" / "trajectory.txt").read_text().splitlines()
    assert lines[0] == "# unit: arbitrary"
    rows = np.loadtxt(tmp_path / "out" / "trajectory.txt")
    assert rows[:, 0].tolist() == [0, 1, 2]
    world_from_cam = invert_rigid(scene.cam_from_world.double())
    np.testing.assert_allclose(rows[:, 1:4], world_from_cam[:, :3, 3], atol=1e-9)
    rotations = torch.stack([rotation_from_quaternion(row) for row in torch.from_numpy(rows[:, [7, 4, 5, 6]])])
    np.testing.assert_allclose(rotations, world_from_cam[:, :3, :3], atol=1e-6)
    spatial = pytest.importorskip("scipy.spatial.transform")
    np.testing.assert_allclose(spatial.Rotation.from_quat(rows[:, 4:]).as_matrix(), rotations, atol=1e-9)


def test_time_stamps_count_the_images_that_are_left_out(scene: Any, tmp_path: Path) -> None:
    for name, some, expected in (
        ("dropped", scene.of_frames([0, 2]), [0, 2]),
        ("given", replace(scene, numbers=[1, 4, 7]), [1, 4, 7]),
        ("both", replace(scene, numbers=[1, 4, 7]).of_frames([2, 0]), [7, 1]),
    ):
        some.save(tmp_path / name, "tum")
        assert np.loadtxt(tmp_path / name / "trajectory.txt")[:, 0].tolist() == expected
        assert f"# {expected[1]} is {some.names[1]}\n" in (tmp_path / name / "trajectory.txt").read_text()


def open3d_or_skip() -> Any:
    try:
        return load_open3d()
    except MissingPackage as error:
        pytest.skip(str(error))


def test_a_mesh_lies_on_what_was_seen(tmp_path: Path) -> None:
    open3d = open3d_or_skip()
    batch, model = load(tmp_path / "photos", "stretch")
    result = reconstruct(batch, model=model)
    result.save(tmp_path / "out", "mesh", conf_percentile=0)
    opened = trimesh.load(tmp_path / "out" / "mesh.ply")
    assert b"comment unit: arbitrary\n" in (tmp_path / "out" / "mesh.ply").read_bytes()[:500]
    assert len(opened.faces) > 1000
    to_sphere = (opened.vertices - SPHERE.numpy()) @ np.eye(3)
    off = np.minimum(abs(opened.vertices[:, 2] - WALL_Z), abs(np.linalg.norm(to_sphere, axis=1) - RADIUS))
    assert np.median(off) < 0.01
    assert (off < 0.1).mean() > 0.9
    again = open3d.io.read_triangle_mesh(str(tmp_path / "out" / "mesh.ply"))
    assert again.has_vertex_colors()
    assert len(again.triangles) == len(opened.faces)
    # The colours say where in a picture a vertex was seen, and so vary.
    assert np.asarray(again.vertex_colors)[:, 0].std() > 0.1


def test_a_mesh_of_nothing_is_not_written(small: Any, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(NEEDS, "mesh", lambda: None)
    monkeypatch.setattr(mesh, "fuse", lambda *_: (np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))))
    small.save(tmp_path / "out", "mesh,ply")
    assert "give no surface" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["files.json", "points.ply"]


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Named, it is an error before the work begins; of all formats it is left out, with a word."""
    import sys

    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(MissingPackage, match=r"depth-exr needs OpenEXR: pip install 'geoaccel\[exr\]'"):
        read_formats("ply,depth-exr")
    assert "depth-exr" not in read_formats("all")
    assert "leaves out depth-exr" in caplog.text
    assert "tum" in read_formats("all")
    assert maps.EXR_FOLDER == "depth-exr"
