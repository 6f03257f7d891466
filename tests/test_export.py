"""Files: they open in the programs that they are for, agree to a fraction of a pixel, and are complete or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_scene import (
    MODES,
    AnalyticModel,
    checked_memory,  # noqa: F401 (a fixture)
    load,
)
from PIL import Image

from geoaccel import export
from geoaccel.backbone import Preprocess
from geoaccel.cameras import invert_rigid, project_points
from geoaccel.export import atomic, colmap, glb
from geoaccel.export.contact_sheet import write_contact_sheet
from geoaccel.images import ImageTransform, load_images
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


@pytest.fixture(scope="module", params=MODES)
def scene(request, tmp_path_factory, checked_memory):  # noqa: F811
    """One scene for all tests, which leave it as it is."""
    batch, model = load(tmp_path_factory.mktemp("scene") / "photos", request.param)
    return reconstruct(batch, model=model)


@pytest.fixture
def small():
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    images = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    return reconstruct(images, model=AnalyticModel(transforms))


def _camera_matrix(camera) -> np.ndarray:  # [3, 3]
    fx, fy, cx, cy = camera.params
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["colmap", "colmap-text"])
def test_colmap_points_land_on_their_pixels(scene, kind, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    cloud = scene.save(tmp_path / "out", [kind], max_points=2000)
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))

    assert len(model.points3D) == len(cloud) == 2000
    assert sorted(image.name for image in model.images.values()) == scene.names
    assert model.compute_mean_reprojection_error() < 0.01
    for i, transform in enumerate(scene.transforms):
        image = model.images[i + 1]
        camera = model.cameras[image.camera_id]
        assert camera.model.name == "PINHOLE"
        assert (camera.height, camera.width) == transform.original_size
        np.testing.assert_allclose(_camera_matrix(camera), scene.original_intrinsics()[i], rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(image.cam_from_world().matrix(), scene.cam_from_world[i, :3], atol=1e-6)
        for observation in image.points2D:
            projected = image.project_point(model.points3D[observation.point3D_id].xyz)
            assert np.abs(projected - observation.xy).max() < 0.01
    for n in range(0, len(cloud), 97):
        point = model.points3D[n + 1]
        source = point.track.elements[0]
        assert source.image_id == cloud.frame[n] + 1
        observation = model.images[source.image_id].points2D[source.point2D_idx]
        assert observation.point3D_id == n + 1
        np.testing.assert_allclose(observation.xy, cloud.pixels[n], atol=1e-6)
        assert (point.color == cloud.colors[n].numpy()).all()


def test_colmap_text_and_binary_say_the_same(small, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    small.save(tmp_path / "out", ["colmap", "colmap-text"])
    folder = str(tmp_path / "out" / "sparse" / "0")
    text, binary = pycolmap.Reconstruction(), pycolmap.Reconstruction()
    text.read_text(folder)
    binary.read_binary(folder)
    assert text.num_points3D() == binary.num_points3D()
    for n, point in binary.points3D.items():
        assert (text.points3D[n].xyz == point.xyz).all()
        elements, others = point.track.elements, text.points3D[n].track.elements
        assert [(e.image_id, e.point2D_idx) for e in elements] == [(e.image_id, e.point2D_idx) for e in others]


def test_colmap_names_with_blanks(small, tmp_path, caplog):
    pycolmap = pytest.importorskip("pycolmap")
    small.names[:] = ["a b.png", "c/d.png"]
    small.save(tmp_path / "out", ["colmap", "colmap-text"])
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    assert [model.images[i].name for i in (1, 2)] == ["a b.png", "c/d.png"]
    assert "'a b.png'" in caplog.text


def test_colmap_tracks_join_views_that_agree(small):
    cloud = small.point_cloud(conf_percentile=0)
    model = colmap.build(small, cloud)
    lengths = model.points3d["track_length"]
    assert lengths.sum() == len(model.tracks) == sum(map(len, model.points2d))
    # The scene is exact: all of a view that another camera can see is in both tracks.
    assert (lengths == 2).mean() > 0.5
    assert model.points3d["error"].max() < 1e-3


def test_colmap_leaves_out_views_that_disagree(small):
    cloud = small.point_cloud(conf_percentile=0)
    small.depth[1] *= 1.5
    assert (colmap.build(small, cloud).points3d["track_length"][cloud.frame == 0] == 1).all()


def test_colmap_records_the_error_of_points_off_their_pixels(small):
    cloud = small.point_cloud(conf_percentile=0)
    small.points_world[0, 10, 20, 0] += 1
    moved = small.point_cloud(conf_percentile=0)
    row = int((cloud.points != moved.points).any(-1).nonzero()[0, 0])
    pixels, _ = project_points(moved.points[row : row + 1], small.original_intrinsics()[0], small.cam_from_world[0])
    expected = float((pixels - moved.pixels[row]).norm())
    assert expected > 5
    assert colmap.build(small, moved).points3d["error"][row] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("degrees", [0, 1e-4, 90, 120, 179.9999, 180])
def test_quaternions(degrees):
    angle, axis = np.radians(degrees), np.array([1.0, -2.0, 3.0]) / np.sqrt(14)
    cross = np.cross(np.eye(3), axis).T
    rotation = np.eye(3) + np.sin(angle) * cross.T + (1 - np.cos(angle)) * cross @ cross
    w, x, y, z = colmap._quaternion(rotation)
    back = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    np.testing.assert_allclose(back, rotation, atol=1e-12)
    assert w >= 0


def test_ply_opens(scene, tmp_path):
    cloud = scene.save(tmp_path / "out", ["ply"])
    opened = trimesh.load(tmp_path / "out" / "points.ply")
    np.testing.assert_array_equal(opened.vertices, cloud.points)
    np.testing.assert_array_equal(opened.colors[:, :3], cloud.colors)


def test_glb_opens_upright_with_a_camera_for_each_photograph(scene, tmp_path):
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
    dark = np.full((4000, 3), 10, np.uint8)
    linear = 255 * ((10 / 255 + 0.055) / 1.055) ** 2.4 if 10 / 255 > 0.04045 else 10 / 12.92
    assert glb._linear_colors(dark).mean() == pytest.approx(linear, rel=0.05)
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
        np.testing.assert_allclose(matrix, scene.original_intrinsics()[i], rtol=1e-6)
        photograph = tmp_path / "out" / frame["file_path"]
        assert not Path(frame["file_path"]).is_absolute()
        assert photograph.resolve() == scene.paths[i].resolve()
        assert Image.open(photograph).size == (camera["w"], camera["h"])


def test_photographs_without_a_usable_file_are_written(tmp_path, small):
    # Tensors have no file; a rotated photograph has one that most programs would not turn upright.
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
    assert second["file_path"] == "../photos/photo_1.png"


def _colmap_sizes(out: Path, kind: str, images: Path) -> dict[str, tuple[int, int]]:
    """Every image of the model, after a look at its file and its camera."""
    pycolmap = pytest.importorskip("pycolmap")
    model, folder = pycolmap.Reconstruction(), str(out / "sparse" / "0")
    model.read_text(folder) if kind == "colmap-text" else model.read_binary(folder)
    found = {}
    for _, image in sorted(model.images.items()):
        camera = model.cameras[image.camera_id]
        with Image.open(images / image.name) as file:
            assert file.getexif().get(0x0112, 1) == 1
            assert file.size == (camera.width, camera.height), image.name
            found[image.name] = file.size
    return found


def _turned(folder: Path, name: str = "photo_0.png"):
    """A scene whose first photograph is turned by its EXIF tag."""
    batch, model = load(folder, "crop")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(batch.paths[0]).rotate(90, expand=True)
    batch.paths[0].unlink()
    picture.save(folder / name, exif=exif)
    return reconstruct(load_images(folder, model.preprocess), model=model)


def test_colmap_leaves_usable_photographs_where_they_are(scene, tmp_path):
    scene.save(tmp_path / "out", ["colmap"])
    assert list(_colmap_sizes(tmp_path / "out", "colmap", scene.paths[0].parent)) == scene.names
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize("formats", [["colmap"], ["colmap-text"], ["colmap", "nerfstudio"], ["nerfstudio", "colmap"]])
def test_colmap_of_turned_photographs_has_a_complete_folder(tmp_path, formats):
    turned = _turned(tmp_path / "photos")
    turned.save(tmp_path / "out", formats)
    images = tmp_path / "out" / "images"
    kind = "colmap-text" if "colmap-text" in formats else "colmap"
    assert list(_colmap_sizes(tmp_path / "out", kind, images)) == turned.names == sorted(os.listdir(images))
    np.testing.assert_array_equal(np.asarray(Image.open(images / "photo_0.png")), turned.read_original(0))
    copy, original = images / "photo_1.png", turned.paths[1]
    assert copy.read_bytes() == original.read_bytes()
    assert not copy.is_symlink()
    assert copy.stat().st_ino != original.stat().st_ino
    if "nerfstudio" in formats:
        frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
        files = [frame["file_path"] for frame in frames]
        assert files == ["images/photo_0.png", "../photos/photo_1.png", "../photos/photo_2.png"]


def test_colmap_can_undistort_what_was_turned(tmp_path):
    """As a user goes on: the pictures that come out are the photographs."""
    pycolmap = pytest.importorskip("pycolmap")
    turned = _turned(tmp_path / "photos")
    turned.save(tmp_path / "out", ["colmap"])
    pycolmap.undistort_images(
        str(tmp_path / "dense"), str(tmp_path / "out" / "sparse" / "0"), str(tmp_path / "out" / "images")
    )
    for i, name in enumerate(turned.names):
        with Image.open(tmp_path / "dense" / "images" / name) as file:
            picture = np.asarray(file.convert("RGB")).astype(float)
        assert picture.shape[:2] == turned.transforms[i].original_size
        assert np.abs(picture - turned.read_original(i).numpy()).mean() < 8


def test_colmap_of_frames_without_files(small, tmp_path):
    """Tensors and video frames; and written under a name that can be."""
    small.names[:] = ["clip_000000.png", "clip.mov"]
    small.save(tmp_path / "out", ["colmap", "nerfstudio"])
    images = tmp_path / "out" / "images"
    found = _colmap_sizes(tmp_path / "out", "colmap", images)
    assert found == {"clip_000000.png": (42, 28), "clip.mov.png": (42, 28)}
    np.testing.assert_array_equal(np.asarray(Image.open(images / "clip.mov.png")), small.read_original(1))
    frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == [f"images/{name}" for name in found]


def test_colmap_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    batch = load_images(tmp_path / "clip.mp4", Preprocess(size=112))
    reconstruct(batch, model=AnalyticModel(batch.transforms)).save(tmp_path / "out", ["colmap"])
    images = tmp_path / "out" / "images"
    assert _colmap_sizes(tmp_path / "out", "colmap", images) == dict.fromkeys(batch.names, (64, 48))
    for i, name in enumerate(batch.names):
        assert abs(np.asarray(Image.open(images / name)).mean() - 60 * i) < 4


def test_colmap_of_photographs_that_share_no_folder(tmp_path):
    """One ``image_path`` cannot lead to two folders, nor twice to one file under two names."""
    batch, model = load(tmp_path / "photos", "crop")
    (tmp_path / "other").mkdir()
    moved = batch.paths[2].rename(tmp_path / "other" / "photo_2.png")
    for name, paths in (("two", [*batch.paths[:2], moved]), ("twice", [batch.paths[0], *batch.paths[:2]])):
        scene = reconstruct(load_images(paths, model.preprocess), model=model)
        scene.save(tmp_path / name, ["colmap"])
        images = tmp_path / name / "images"
        assert sorted(_colmap_sizes(tmp_path / name, "colmap", images)) == sorted(os.listdir(images))
        assert len(os.listdir(images)) == 3
        for path, written in zip(paths, scene.names, strict=True):
            assert (images / written).read_bytes() == path.read_bytes()


def test_names_that_are_written_stay_apart(tmp_path):
    """A turned ``a.tif`` becomes a PNG, and ``a.tif.png`` is another photograph."""
    turned = _turned(tmp_path / "photos", "a.tif")
    turned.paths[1] = turned.paths[1].rename(tmp_path / "photos" / "a.tif.png")
    turned.names[1] = "a.tif.png"
    assert turned.names[0] == "a.tif"
    turned.save(tmp_path / "out", ["colmap"])
    found = _colmap_sizes(tmp_path / "out", "colmap", tmp_path / "out" / "images")
    assert list(found) == ["a.tif_.png", "a.tif.png", "photo_2.png"]
    written = np.asarray(Image.open(tmp_path / "out" / "images" / "a.tif_.png"))
    np.testing.assert_array_equal(written, turned.read_original(0))


def test_npz_has_everything(scene, tmp_path):
    scene.save(tmp_path / "out", ["npz"])
    with np.load(tmp_path / "out" / "reconstruction.npz") as arrays:
        for name in ("cam_from_world", "intrinsics", "depth", "points_world", "conf", "mask"):
            np.testing.assert_array_equal(arrays[name], getattr(scene, name))
        assert arrays["names"].tolist() == scene.names
        transforms = [
            ImageTransform(tuple(size), scene.transforms[0].network_size, tuple(scale), tuple(offset))
            for size, scale, offset in zip(arrays["original_size"], arrays["scale"], arrays["offset"], strict=True)
        ]
        assert transforms == scene.transforms


def test_all_formats_in_one_folder(small, tmp_path):
    small.save(tmp_path / "new" / "out", list(export.FORMATS))
    out = tmp_path / "new" / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files >= {"points.ply", "scene.glb", "transforms.json", "reconstruction.npz", "contact_sheet.png"}
    assert files >= {f"sparse/0/{name}.{kind}" for name in ("cameras", "images", "points3D") for kind in ("bin", "txt")}
    listed = json.loads((out / atomic.MANIFEST).read_text())["files"]
    assert {*listed, atomic.MANIFEST} == files
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(small, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setitem(export.FORMATS._entries, "npz", fail)
    with pytest.raises(error):
        small.save(tmp_path / "out", ["ply", "npz"])
    assert os.listdir(tmp_path) == []

    monkeypatch.undo()
    small.save(tmp_path / "out", ["ply"])
    monkeypatch.setitem(export.FORMATS._entries, "npz", fail)
    with pytest.raises(error):
        small.save(tmp_path / "out", ["npz"], overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "points.ply").exists()


def test_overwriting_replaces_an_earlier_result_and_nothing_else(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    small.save(out, ["ply"])
    with pytest.raises(FileExistsError, match="not empty"):
        small.save(out, ["npz"])
    small.save(out, ["npz"], overwrite=True)
    assert sorted(os.listdir(out)) == [atomic.MANIFEST, "reconstruction.npz"]
    assert os.listdir(tmp_path) == ["out"]

    (out / "images").mkdir()
    (out / "images" / "mine.jpg").touch()
    with pytest.raises(FileExistsError, match=r"images/mine\.jpg"):
        small.save(out, ["npz"], overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(FileExistsError, match=r"a\.jpg"):
        small.save(tmp_path / "photos", ["npz"], overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    with atomic.atomic_folder(tmp_path / "out") as work:
        (work / "old").touch()

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(atomic.os, "rename", fail)
    with pytest.raises(OSError, match="disk"), atomic.atomic_folder(tmp_path / "out", overwrite=True) as work:
        (work / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("place", ["mount point", "working folder"])
def test_a_folder_that_exists_stays_the_same_one(small, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    out.mkdir()
    number, rename = out.stat().st_ino, os.rename

    def busy(source, target):
        if out in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(out))
        rename(source, target)

    if place == "mount point":
        monkeypatch.setattr(os, "rename", busy)  # Path.rename calls it, too
    else:
        monkeypatch.chdir(out)
        out = Path(".")
    small.save(out, ["ply"])
    small.save(out, ["npz", "nerfstudio"], overwrite=True)
    assert sorted(os.listdir(out)) == [
        atomic.MANIFEST, "images", "points.ply", "reconstruction.npz", "transforms.json"
    ]  # fmt: skip
    assert out.stat().st_ino == (tmp_path / "out").stat().st_ino == number
    listed = json.loads((out / atomic.MANIFEST).read_text())["files"]
    assert {*listed, atomic.MANIFEST} == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}


def test_what_marks_a_result_as_complete_goes_first_and_comes_last(tmp_path, monkeypatch):
    out, rename, seen = tmp_path / "out", os.rename, []
    out.mkdir()

    def watch(source, target):
        rename(source, target)
        seen.append((Path(source).name, (out / atomic.MANIFEST).exists()))

    monkeypatch.setattr(atomic.os, "rename", watch)
    for names in ("az", "by"):
        with atomic.atomic_folder(out, overwrite=True) as work:
            for name in names:
                (work / name).touch()
    M = atomic.MANIFEST
    assert seen == [
        ("a", False), ("z", False), (M, True),
        (M, False), ("z", False), ("a", False), ("b", False), ("y", False), (M, True),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(5))
def test_a_replacement_that_fails_anywhere_is_undone(tmp_path, monkeypatch, step, after, error):
    out, rename, calls = tmp_path / "out", os.rename, []
    with atomic.atomic_folder(out) as work:
        (work / "points").write_text("old")
        (work / "old").touch()
    before = {path.name: path.read_text() for path in out.iterdir()}

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == step + 1 and not after:
            raise error("disk")
        rename(source, target)
        if len(calls) == step + 1:
            raise error("disk")

    monkeypatch.setattr(atomic.os, "rename", fail_once)
    with pytest.raises(error, match="disk"), atomic.atomic_folder(out, overwrite=True) as work:
        (work / "points").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_two_runs_in_one_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic.atomic_folder(out) as work:
        (work / "a").touch()
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=r"holds \.geoaccel-.*\.tmp, where another run is writing"):
                atomic.check_output_folder(out, overwrite=overwrite)
    assert sorted(os.listdir(out)) == ["a", atomic.MANIFEST]

    # What somebody else puts there meanwhile is not replaced.
    def write_beside_another():
        with atomic.atomic_folder(out, overwrite=True) as work:
            (work / "mine").write_text("new")
            (out / "mine").write_text("theirs")

    with pytest.raises(FileExistsError, match="holds mine"):
        write_beside_another()
    assert (out / "mine").read_text() == "theirs"
    assert sorted(os.listdir(out)) == ["a", atomic.MANIFEST, "mine"]


def test_overwriting_spares_the_photographs(tmp_path):
    """Also as links, from either side."""
    batch, model = load(tmp_path / "photos", "crop")
    result = reconstruct(batch, model=model)
    out = tmp_path / "out"
    with atomic.atomic_folder(out) as work:
        for path in result.paths:
            (work / path.name).write_bytes(path.read_bytes())
        (work / "link.png").symlink_to(result.paths[0])
    (tmp_path / "link.png").symlink_to(out / "photo_0.png")
    before = sorted(os.listdir(out))
    for path in (out / "photo_0.png", out / "link.png", tmp_path / "link.png"):
        result.paths[0] = path
        with pytest.raises(FileExistsError, match=r"which lies in the output folder .* choose another output folder"):
            result.save(out, ["npz"], overwrite=True)
        assert sorted(os.listdir(out)) == before
    result.paths[0] = batch.paths[1]
    result.save(out, ["npz"], overwrite=True)
    assert sorted(os.listdir(out)) == [atomic.MANIFEST, "reconstruction.npz"]


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    """One that still makes folders."""

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    for out in (tmp_path, tmp_path / "new" / "out"):
        with pytest.raises(OSError, match=r"cannot write to .* \(no space left on device\); choose another"):
            atomic.check_output_folder(out)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        small.save(tmp_path / "file", ["npz"])
    with pytest.raises(OSError, match=r"cannot write to .*not a directory"):
        small.save(tmp_path / "file" / "out", ["npz"])

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"cannot write to .* \(permission denied\)") as caught:
        small.save(tmp_path / "out", ["npz"])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_new_folders_have_ordinary_permissions(small, tmp_path):
    small.save(tmp_path / "out", ["npz"])
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unknown_formats(small, tmp_path):
    with pytest.raises(ValueError, match=r"known: colmap, .*Did you mean 'glb'\?"):
        small.save(tmp_path / "out", ["ply", "gbl"])
    with pytest.raises(ValueError, match="pass a list"):
        small.save(tmp_path / "out", "ply")
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
