"""The other formats: they open in the programs that they are for, and say what the reconstruction says."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from analytic_scene import AnalyticModel, load
from export_scenes import checked_memory, scene, small  # noqa: F401 (fixtures)
from matplotlib.figure import Figure
from PIL import Image
from torch_work import work_of

from geoaccel import atomic
from geoaccel.cameras import invert_rigid
from geoaccel.export import glb
from geoaccel.export.comparison_sheet import write_comparison
from geoaccel.export.contact_sheet import write_contact_sheet
from geoaccel.export.drawing import draw_view
from geoaccel.export.frames import frame_colors
from geoaccel.images import ImageTransform, load_images
from geoaccel.reconstruction import reconstruct
from geoaccel.scene import CONF_PERCENTILE

pytestmark = pytest.mark.usefixtures("checked_memory")


def test_ply_opens(scene, tmp_path):
    cloud = scene.save(tmp_path / "out", ["ply"])
    opened = trimesh.load(tmp_path / "out" / "points.ply")
    np.testing.assert_array_equal(opened.vertices, cloud.points)
    np.testing.assert_array_equal(opened.colors[:, :3], cloud.colors)


def test_glb_opens_upright_with_a_camera_for_each_image(scene, tmp_path):
    cloud = scene.save(tmp_path / "out", ["glb"])
    opened = trimesh.load(tmp_path / "out" / "scene.glb")
    assert opened.geometry["points"].vertices.shape == (len(cloud), 3)
    np.testing.assert_allclose(opened.geometry["points"].vertices, cloud.points, atol=1e-5)
    cameras = [name for name in opened.geometry if name.startswith("camera_")]
    assert len(cameras) == len(scene)
    assert all(name.endswith(".png") for name in cameras)
    upright = opened.graph.get("points")[0]
    assert np.linalg.det(upright[:3, :3]) == pytest.approx(1)
    # In the world of the first camera down is +y and forward is +z; a glTF viewer has +y up and looks along -z.
    assert upright[:3, :3] @ [0, 1, 0] @ [0, 1, 0] < -0.9
    assert upright[:3, :3] @ [0, 0, 1] @ [0, 0, 1] < -0.9
    # The apex of each frustum is the camera's centre.
    for i, name in enumerate(sorted(cameras)):
        placed = opened.graph.get(name)[0]
        np.testing.assert_allclose(placed, upright @ invert_rigid(scene.cam_from_world[i]).numpy(), atol=1e-5)


def test_glb_colors_are_linear_without_bands(small):
    # Both parts of the curve: 10 / 12.92, and 255 ((128 / 255 + 0.055) / 1.055)^2.4.
    for level, linear in ((10, 0.774), (128, 55.04)):
        assert glb._linear_colors(np.full((4000, 3), level, np.uint8)).mean() == pytest.approx(linear, rel=0.05)
    assert (glb._linear_colors(np.array([[0, 255, 0]], np.uint8)) == [[0, 255, 0]]).all()


@pytest.mark.parametrize("roll", [0.0, 0.5, np.pi])
def test_gltf_axes_follow_the_cameras_up(roll):
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]
    axes = glb.gltf_from_world(np.stack([pose] * 3))
    np.testing.assert_allclose(axes[:3, :3] @ -pose[:3, 1], [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(axes[:3, :3] @ axes[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(axes) == pytest.approx(1)


def test_nerfstudio_poses_and_files(scene, tmp_path):
    scene.save(tmp_path / "out", ["nerfstudio"])
    document = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert (tmp_path / "out" / document["ply_file_path"]).exists()
    opengl = np.diag([1.0, -1.0, -1.0, 1.0])
    for i, frame in enumerate(document["frames"]):
        pose = np.linalg.inv(np.array(frame["transform_matrix"]) @ opengl)
        np.testing.assert_allclose(pose, scene.cam_from_world[i], atol=1e-6)
        camera = {**document, **frame}
        matrix = np.array([[camera["fl_x"], 0, camera["cx"]], [0, camera["fl_y"], camera["cy"]], [0, 0, 1]])
        np.testing.assert_allclose(matrix, scene.original_intrinsics()[i], atol=1e-3)
        assert frame["file_path"] == f"images/{scene.names[i]}"
        image_file = tmp_path / "out" / frame["file_path"]
        assert image_file.samefile(scene.paths[i])
        assert Image.open(image_file).size == (camera["w"], camera["h"])


def test_images_without_a_usable_file_are_written(tmp_path, small):
    # Tensors have no file; a rotated image has one that most programs would not turn upright.
    small.save(tmp_path / "tensors", ["nerfstudio"])
    document = json.loads((tmp_path / "tensors" / "transforms.json").read_text())
    assert "fl_x" in document
    written = np.asarray(Image.open(tmp_path / "tensors" / document["frames"][0]["file_path"]))
    assert np.abs(written / 255 - small.images[0].permute(1, 2, 0).numpy()).max() < 0.003

    batch, model = load(tmp_path / "photos", "crop")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(batch.paths[0]).rotate(90, expand=True).save(tmp_path / "photos" / "photo_0.png", exif=exif)
    turned = reconstruct(load_images(tmp_path / "photos", model.preprocess), model=model)
    turned.save(tmp_path / "turned", ["nerfstudio"])
    first, second, _ = json.loads((tmp_path / "turned" / "transforms.json").read_text())["frames"]
    assert first["file_path"] == "images/photo_0.png"
    assert Image.open(tmp_path / "turned" / first["file_path"]).size == (first["w"], first["h"])
    assert second["file_path"] == "images/photo_1.png"


def test_npz_has_everything(scene, tmp_path):
    scene.save(tmp_path / "out", ["npz"])
    with np.load(tmp_path / "out" / "reconstruction.npz") as arrays:
        for name in ("cam_from_world", "intrinsics", "depth", "points_world", "conf", "mask"):
            np.testing.assert_array_equal(arrays[name], getattr(scene, name))
        assert arrays["selected"].all()
        assert arrays["names"].tolist() == scene.names
        transforms = [
            ImageTransform(tuple(size), scene.transforms[0].network_size, tuple(scale), tuple(offset))
            for size, scale, offset in zip(arrays["original_size"], arrays["scale"], arrays["offset"], strict=True)
        ]
        assert transforms == scene.transforms
    chosen = scene.images[:, 0] > 0.5
    scene.save(tmp_path / "chosen", ["npz"], mask=chosen)
    with np.load(tmp_path / "chosen" / "reconstruction.npz") as arrays:
        np.testing.assert_array_equal(arrays["selected"], chosen)
        np.testing.assert_array_equal(arrays["mask"], scene.mask)


def test_all_formats_in_one_folder(small, tmp_path):
    small.save(tmp_path / "new" / "out", "all")
    out = tmp_path / "new" / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files >= {"points.ply", "scene.glb", "transforms.json", "reconstruction.npz", "contact_sheet.png"}
    assert files >= {f"sparse/0/{name}.{kind}" for name in ("cameras", "images", "points3D") for kind in ("bin", "txt")}
    listed = json.loads((out / atomic.MANIFEST).read_text())["files"]
    assert {*listed, atomic.MANIFEST} == files
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("unit", ["arbitrary", "about a metre"])
def test_every_format_says_its_unit(small, tmp_path, unit):
    replace(small, unit=unit).save(tmp_path / "out", "all")
    out = tmp_path / "out"
    head = (out / "points.ply").read_bytes().partition(b"end_header")[0].decode()
    assert f"comment unit: {unit}\n" in head
    assert len(trimesh.load(out / "points.ply").vertices)
    assert trimesh.load(out / "scene.glb").metadata["unit"] == unit
    assert json.loads((out / "transforms.json").read_text())["unit"] == unit
    assert (out / "sparse" / "0" / "unit.txt").read_text() == f"{unit}\n"
    assert Image.open(out / "contact_sheet.png").text["Unit"] == unit
    with np.load(out / "reconstruction.npz") as arrays:
        assert str(arrays["unit"]) == unit


def test_unknown_formats(small, tmp_path):
    with pytest.raises(ValueError, match=r"known: colmap, .*Did you mean 'glb'\?"):
        small.save(tmp_path / "out", ["ply", "gbl"])
    with pytest.raises(ValueError, match=r"Did you mean 'glb'\?"):
        small.save(tmp_path / "out", "ply,gbl")
    with pytest.raises(ValueError, match="no output format"):
        small.save(tmp_path / "out", [])
    assert os.listdir(tmp_path) == []


def test_contact_sheet(tmp_path):
    batch, model = load(tmp_path / "photos", "pad")
    scene = reconstruct(batch, model=model)
    write_contact_sheet(scene, tmp_path / "plain.png")
    write_contact_sheet(scene, tmp_path / "truth.png", title="A title", gt_depth=scene.depth * 3)
    plain, truth = Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "truth.png")
    assert plain.width > 700
    assert truth.height > plain.height
    assert np.asarray(plain.convert("L")).std() > 10


def test_contact_sheet_of_many_frames_and_no_points(small, tmp_path):
    small.mask[:] = False
    write_contact_sheet(small, tmp_path / "empty.png")
    transforms = [ImageTransform((14, 28), (14, 28), (1.0, 1.0), (0.0, 0.0))] * 11
    many = reconstruct(torch.rand(11, 3, 14, 28), model=AnalyticModel(transforms))
    write_contact_sheet(many, tmp_path / "many.png")


def test_a_scene_is_drawn_where_masks_keep_what_is_unsure(small):
    unsure = small.selecting(small.conf < small.confidence_cut(20))
    assert not unsure.usable(CONF_PERCENTILE).any()
    axes = Figure().add_subplot()
    draw_view(axes, unsure, frame_colors(len(unsure)))
    assert len(axes.collections[0].get_offsets()) == unsure.kept.sum()


def test_drawing_grows_as_the_scene():
    def calls(frames):
        transforms = [ImageTransform((14, 28), (14, 28), (1.0, 1.0), (0.0, 0.0))] * frames
        given = reconstruct(torch.rand(frames, 3, 14, 28), model=AnalyticModel(transforms))
        return work_of(lambda: draw_view(Figure().add_subplot(), given, frame_colors(frames))).calls

    assert calls(40) < 2.2 * calls(20)


def test_a_comparison_shows_every_way(small, tmp_path):
    """A panel beside the other for each, taller by the lines of text."""
    sizes = {}
    for ways, lines in ((1, 1), (2, 1), (2, 3)):
        shown = {f"way {i}": (small, ["so fast", "so good", "so small"][:lines]) for i in range(ways)}
        write_comparison(shown, tmp_path / "ways.png", title="Two ways")
        with Image.open(tmp_path / "ways.png") as picture:
            sizes[ways, lines] = picture.size
            assert np.asarray(picture.convert("L")).std() > 10
    assert sizes[2, 1][0] > 1.9 * sizes[1, 1][0]
    assert sizes[2, 3][0] == sizes[2, 1][0]
    assert sizes[2, 3][1] > sizes[2, 1][1]
