"""A scene folder that splatting trainers and COLMAP take as it is, and that can be moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_scene import load
from export_scenes import checked_memory, small  # noqa: F401 (fixtures)
from PIL import Image

from geoaccel import atomic, export
from geoaccel.images import load_images
from geoaccel.images.sources import list_pictures
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


def photographs(folder: Path) -> tuple[Any, Any]:
    """Three of one size, and a model that knows them."""
    batch, model = load(folder, "pad")
    return reconstruct(batch, model=model), model


def splats_see(folder: Path) -> dict[str, tuple[int, int]]:
    """What gsplat's and 3DGS's loaders do: names of the model in ``sparse/0``, joined to ``images``, at its sizes."""
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction(str(folder / "sparse" / "0"))
    found = {}
    for image in model.images.values():
        with Image.open(folder / "images" / image.name) as file:
            found[image.name] = file.size
        camera = model.cameras[image.camera_id]
        assert camera.model.name in ("PINHOLE", "SIMPLE_PINHOLE")  # 3DGS takes no others
        assert found[image.name] == (camera.width, camera.height)
    assert len(model.points3D) > 100
    return dict(sorted(found.items()))


def nerfstudio_sees(folder: Path) -> list[Path]:
    """By the documented schema: files relative to transforms.json, of the size that it says."""
    document = json.loads((folder / "transforms.json").read_text())
    assert document["camera_model"] == "OPENCV"
    assert (folder / document["ply_file_path"]).is_file()
    files = []
    for frame in document["frames"]:
        camera = {**document, **frame}
        assert not os.path.isabs(frame["file_path"])
        files.append(folder / frame["file_path"])
        with Image.open(files[-1]) as file:
            assert file.size == (camera["w"], camera["h"])
        assert np.array(frame["transform_matrix"]).shape == (4, 4)
    return files


@pytest.mark.parametrize("images", ["link", "copy"])
def test_a_folder_that_can_be_moved_away_from_the_photographs(tmp_path: Path, images: str) -> None:
    result, _ = photographs(tmp_path / "photos")
    result.save(tmp_path / "out", "colmap,nerfstudio", images=images)
    same = (tmp_path / "out" / "images" / "photo_1.png").samefile(tmp_path / "photos" / "photo_1.png")
    assert same == (images == "link")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere" / "scene")
    shutil.rmtree(tmp_path / "photos")
    assert list(splats_see(moved)) == result.names
    assert all(path.resolve().is_relative_to(moved) for path in nerfstudio_sees(moved))
    document = json.loads((moved / "files.json").read_text())
    assert document["formats"]["images"] == [f"images/{name}" for name in result.names]
    assert document["formats"]["nerfstudio"] == ["points.ply", "transforms.json"]
    listed = sorted(file for files in document["formats"].values() for file in files)
    assert listed == document["files"]
    assert document["frames"][1] == {"name": "photo_1.png", "image": "images/photo_1.png", "height": 160, "width": 110}
    assert (document["unit"], document["points"]) == ("arbitrary", len(result.point_cloud()))


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = photographs(tmp_path / "photos")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result.save(tmp_path / "out", "colmap")
    assert list(splats_see(tmp_path / "out")) == result.names
    assert not (tmp_path / "out" / "images" / "photo_0.png").samefile(result.paths[0])


def test_photographs_that_stay_where_they_are(tmp_path: Path) -> None:
    result, _ = photographs(tmp_path / "photos")
    result.save(tmp_path / "out", "colmap,nerfstudio", images="none")
    assert not (tmp_path / "out" / "images").exists()
    assert [path.resolve() for path in nerfstudio_sees(tmp_path / "out")] == result.paths
    (tmp_path / "out" / "images").symlink_to(tmp_path / "photos")
    assert list(splats_see(tmp_path / "out")) == result.names
    with pytest.raises(ValueError, match="Did you mean 'copy'"):
        result.save(tmp_path / "other", "colmap", images="copies")


def test_what_other_programs_read_otherwise_does_not_stay_where_it_is(tmp_path: Path, small: Any) -> None:
    with pytest.raises(ValueError, match=r"frame_0000.png has no file of its own; use --images link"):
        small.save(tmp_path / "out", "colmap", images="none")
    small.save(tmp_path / "fine", "ply", images="none")
    _, model = photographs(tmp_path / "photos")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "photos" / "photo_0.png").rotate(90, expand=True).save(
        tmp_path / "photos" / "photo_0.png", exif=exif
    )
    turned = reconstruct(load_images(tmp_path / "photos", model.preprocess), model=model)
    with pytest.raises(ValueError, match=r"photo_0.png is rotated by its EXIF tag"):
        turned.save(tmp_path / "out", "colmap", images="none")
    assert sorted(os.listdir(tmp_path)) == ["fine", "photos"]


def test_a_project_that_holds_only_images_is_filled(tmp_path: Path) -> None:
    project = tmp_path / "proj"
    result, model = photographs(project / "images")
    before = {path.name: path.stat().st_mtime_ns for path in (project / "images").iterdir()}
    result.save(project, "colmap,nerfstudio,png")
    assert {path.name: path.stat().st_mtime_ns for path in (project / "images").iterdir()} == before
    assert list(splats_see(project)) == result.names
    assert nerfstudio_sees(project) == [project / "images" / name for name in result.names]
    listed = json.loads((project / "files.json").read_text())["files"]
    assert not any(name.startswith("images/") for name in listed)
    # Again, with what lies there now: the contact sheet is none of the photographs.
    assert [picture.name for picture in list_pictures(project)] == result.names
    again = reconstruct(load_images(project, model.preprocess), model=model)
    with pytest.raises(FileExistsError, match="not empty"):
        again.save(project, "ply")
    again.save(project, "ply", overwrite=True)
    assert sorted(os.listdir(project)) == ["files.json", "images", "points.ply"]
    assert len(os.listdir(project / "images")) == 3


def test_a_project_with_part_of_the_photographs_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    project = tmp_path / "proj"
    result, _ = photographs(project / "images")
    (tmp_path / "photo_2.png").write_bytes(result.paths[2].read_bytes())
    inside, maps = [*result.paths[:2], tmp_path / "photo_2.png"], [project / "depth" / "photo_0.png"]
    for formats, files, masks in (("colmap", inside, ()), ("ply,depth", result.paths, (maps,))):
        frames = list(zip(result.names, files, strict=True))
        with pytest.raises(FileExistsError, match=r"holds inputs of this run, .* choose another"):
            export.check_images("link", formats.split(","), frames, project, *masks)
        export.check_images("link", ["ply"], frames, project, *masks)


def test_images_that_a_result_wrote_are_no_project(tmp_path: Path) -> None:
    """What overwriting would remove is not what the new result may be made of."""
    result, model = photographs(tmp_path / "photos")
    result.save(tmp_path / "out", "colmap")
    again = reconstruct(load_images(tmp_path / "out" / "images", model.preprocess), model=model)
    with pytest.raises(FileExistsError, match="lies in the output folder"):
        again.save(tmp_path / "out", "ply", overwrite=True)
    assert list(splats_see(tmp_path / "out")) == result.names


def test_a_project_with_anything_else_is_not_filled(tmp_path: Path) -> None:
    project = tmp_path / "proj"
    result, _ = photographs(project / "images")
    (project / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"is not empty|contains notes.txt"):
            result.save(project, "ply", overwrite=overwrite)
    (project / "notes.txt").unlink()
    other, _ = photographs(tmp_path / "others")
    with pytest.raises(FileExistsError, match="is not empty"):
        other.save(project, "ply")
    assert sorted(os.listdir(project)) == ["images"]


def test_a_failure_leaves_a_project_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "proj"
    result, _ = photographs(project / "images")

    def fail(*_: Any) -> None:
        raise RuntimeError

    assert "ply" in export.FORMATS
    monkeypatch.setitem(export.FORMATS._entries, "ply", fail)
    with pytest.raises(RuntimeError):
        result.save(project, "colmap,ply")
    assert sorted(os.listdir(project)) == ["images"]
    monkeypatch.undo()

    def clash() -> None:
        with atomic.atomic_folder(project, inputs=result.inputs) as work:
            (work / "images").mkdir()

    with pytest.raises(FileExistsError, match="the result would write its own images"):
        clash()
    assert len(os.listdir(project / "images")) == 3


def test_names_below_a_project_are_paths_from_its_images(tmp_path: Path) -> None:
    project = tmp_path / "proj"
    _, model = photographs(project / "images" / "left")
    (project / "images" / "right").mkdir()
    (project / "images" / "left" / "photo_2.png").rename(project / "images" / "right" / "photo_2.png")
    batch = load_images(project / "images", model.preprocess, recursive=True)
    assert batch.names == ["photo_0.png", "photo_1.png", "photo_2.png"]
    reconstruct(batch, model=model).save(project, "colmap,nerfstudio")
    assert sorted(splats_see(project)) == ["left/photo_0.png", "left/photo_1.png", "right/photo_2.png"]
    assert [path.parent.name for path in nerfstudio_sees(project)] == ["left", "left", "right"]
