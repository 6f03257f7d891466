"""COLMAP models beside images that other programs can read as the model says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from analytic_scene import AnalyticModel, load
from export_scenes import checked_memory, scene, small  # noqa: F401 (fixtures)
from PIL import Image

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.export.frames import _stored_upright, _write_photograph
from geoaccel.images import load_images
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


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


def _turned(folder: Path, name: str = "photo_0.png", second: str = "photo_1.png"):
    """A scene whose first image is rotated by its EXIF tag."""
    batch, model = load(folder, "crop")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(batch.paths[0]).rotate(90, expand=True)
    batch.paths[0].unlink()
    picture.save(folder / name, exif=exif)
    batch.paths[1].rename(folder / second)
    return reconstruct(load_images(folder, model.preprocess), model=model)


@pytest.mark.parametrize("formats", [["colmap"], ["colmap-text"], ["colmap", "nerfstudio"], ["nerfstudio", "colmap"]])
def test_colmap_of_turned_images_has_a_complete_folder(tmp_path, formats):
    turned = _turned(tmp_path / "photos")
    turned.save(tmp_path / "out", formats)
    images = tmp_path / "out" / "images"
    kind = "colmap-text" if "colmap-text" in formats else "colmap"
    assert list(_colmap_sizes(tmp_path / "out", kind, images)) == turned.names == sorted(os.listdir(images))
    np.testing.assert_array_equal(np.asarray(Image.open(images / "photo_0.png")), turned.read_original(0))
    link, original = images / "photo_1.png", turned.paths[1]
    assert link.read_bytes() == original.read_bytes()
    assert not link.is_symlink()
    assert link.stat().st_ino == original.stat().st_ino
    if "nerfstudio" in formats:
        frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
        files = [frame["file_path"] for frame in frames]
        assert files == [f"images/photo_{i}.png" for i in range(3)]


def test_colmap_can_undistort_what_was_turned(tmp_path):
    """As a user goes on: the images that come out are the originals."""
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


def test_colmap_of_images_that_share_no_folder(tmp_path):
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
    """A turned ``a.tif`` becomes a PNG, and ``a.tif.png`` is another image."""
    turned = _turned(tmp_path / "photos", "a.tif", "a.tif.png")
    assert turned.names[:2] == ["a.tif", "a.tif.png"]
    turned.save(tmp_path / "out", ["colmap"])
    found = _colmap_sizes(tmp_path / "out", "colmap", tmp_path / "out" / "images")
    assert list(found) == ["a.tif_.png", "a.tif.png", "photo_2.png"]
    written = np.asarray(Image.open(tmp_path / "out" / "images" / "a.tif_.png"))
    np.testing.assert_array_equal(written, turned.read_original(0))


@pytest.mark.parametrize("images", ["link", "copy"])
def test_a_photograph_is_never_written_to(tmp_path, images):
    """Neither by an image in memory that would have its name, nor where two frames were given one name."""
    batch, model = load(tmp_path / "photos", "crop")
    path = batch.paths[0].rename(tmp_path / "photos" / "image_0001.png")
    photograph, black = path.read_bytes(), np.zeros((*batch.transforms[0].original_size, 3), np.uint8)
    batch = load_images([path, black], model.preprocess)
    scene = reconstruct(batch, model=AnalyticModel(batch.transforms))
    scene.save(tmp_path / "out", ["colmap"], images=images)
    assert path.read_bytes() == (tmp_path / "out" / "images" / "image_0001.png").read_bytes() == photograph
    assert not np.asarray(Image.open(tmp_path / "out" / "images" / scene.names[1])).any()
    scene.names[1] = scene.names[0]
    with pytest.raises(UserError, match=r"two images would be images/image_0001.png"):
        scene.save(tmp_path / "again", ["colmap"], images=images)
    with pytest.raises(FileExistsError):
        _write_photograph(scene, 1, tmp_path / "out" / "images" / "image_0001.png")
    assert path.read_bytes() == photograph


@pytest.mark.parametrize("orientation", range(10))
def test_only_a_file_that_is_stored_as_it_is_seen_can_be_used(tmp_path, orientation):
    """Mirrored and upside down have the size of upright; a file of another size was replaced meanwhile."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (12, 8)).save(tmp_path / "photo.jpg", exif=exif)
    assert _stored_upright(tmp_path / "photo.jpg", (8, 12)) == (orientation in (0, 1, 9))
    assert not _stored_upright(tmp_path / "photo.jpg", (8, 10))
