"""Where images come from: folders, patterns, lists, masks beside them; in which order, and under which names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import SMALL, noise, one_line_of, save, to_uint8
from PIL import Image
from references import DATA

from geoaccel.images import find_masks, load_images, load_masks, natural_key
from geoaccel.images.masks import _find

GOLDEN = DATA / "preprocess.safetensors"


def test_natural_order() -> None:
    names = ["b1", "a10.png", "A9.png", "a1_10", "a1_9", "7", "12"]
    assert sorted(names, key=natural_key) == ["7", "12", "a1_9", "a1_10", "A9.png", "a10.png", "b1"]


def write_folder(folder: Path) -> None:
    for number in (10, 9, 1):
        save(folder / f"img_{number}.png", np.full((30, 40, 3), number, np.uint8))
    (folder / "notes.txt").write_text("not an image")
    (folder / "._img_1.png").write_text("what macOS leaves on other disks")


def first_values(batch_images: torch.Tensor) -> list[int]:
    return to_uint8(batch_images)[:, 0, 0, 0].tolist()


def test_folder_pattern_and_list(tmp_path: Path) -> None:
    write_folder(tmp_path / "scene" / "images")
    folder = tmp_path / "scene" / "images"
    for source in (folder, str(tmp_path / "scene"), [folder], str(folder / "*.png"), str(tmp_path / "**" / "*.png")):
        batch = load_images(source, SMALL)
        assert batch.names == ["img_1.png", "img_9.png", "img_10.png"]
        assert batch.paths == [folder / name for name in batch.names]
        assert first_values(batch.images) == [1, 9, 10]
        assert len(batch) == 3
    listed = load_images([folder / "img_9.png", str(folder / "img_10.png"), noise(30, 40)], SMALL)
    assert listed.names == ["img_9.png", "img_10.png", "image_0002.png"]
    assert listed.paths[2] is None
    assert load_images(folder / "img_9.png", SMALL).names == ["img_9.png"]


def test_images_beside_a_nested_folder_win(tmp_path: Path) -> None:
    save(tmp_path / "top.png", noise(30, 40))
    save(tmp_path / "images" / "nested.png", noise(30, 40))
    save(tmp_path / "other" / "deep.png", noise(30, 40))
    assert load_images(tmp_path, SMALL).names == ["top.png"]


def test_names_are_unique(tmp_path: Path) -> None:
    left, right = save(tmp_path / "left" / "0.png", noise(30, 40)), save(tmp_path / "right" / "0.png", noise(30, 40))
    assert load_images([left, right], SMALL).names == ["left/0.png", "right/0.png"]
    assert load_images([left, left], SMALL).names == ["0.png", "0_2.png"]
    other = save(left.with_name("0_2.png"), noise(30, 40))
    named = load_images([left, left, other, left, other], SMALL).names
    assert named == ["0.png", "0_3.png", "0_2.png", "0_4.png", "0_2_2.png"]  # every file has its own name once
    array = noise(30, 40)
    for name in ("image_0001.png", "IMAGE_0001.PNG"):  # one file on some disks
        file = save(tmp_path / name, array)
        assert load_images([file, array, array], SMALL).names == [name, "image_0001_2.png", "image_0002.png"]


def test_max_frames_thins_evenly() -> None:
    arrays = [np.full((30, 40, 3), i, np.uint8) for i in range(11)]
    assert first_values(load_images(arrays, SMALL, max_frames=3).images) == [0, 5, 10]
    assert len(load_images(arrays, SMALL, max_frames=50)) == 11
    assert first_values(load_images(arrays, SMALL, max_frames=1).images) == [0]


def test_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    load_images([noise(30, 40)], SMALL)
    assert capsys.readouterr() == ("", "")
    load_images([noise(30, 40)], SMALL, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "reading images" in captured.err


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(30, 40))
    batch = load_images(path, SMALL)
    save(path, noise(31, 40))
    with pytest.raises(ValueError, match="now 40x31") as error:
        batch.original(0)
    one_line_of(error)


def test_masks_are_what_is_opaque_or_else_bright(tmp_path: Path) -> None:
    """A cut-out has its object opaque, dark or not; laid on white, what is cut away would be bright."""
    kept = np.zeros((42, 56), bool)
    kept[:21] = True
    Image.new("RGB", (56, 42)).save(tmp_path / "a.png")
    batch = load_images([tmp_path / "a.png"], SMALL)
    grey = Image.fromarray(np.where(kept, 255, 0).astype(np.uint8))
    black = Image.new("RGB", (56, 42))
    black.putalpha(grey)
    opaque = grey.convert("RGB")
    opaque.putalpha(255)
    expected = batch.transforms[0].nearest(torch.from_numpy(kept))
    for name, mask in (("grey", grey), ("cut-out", black), ("opaque", opaque), ("palette", black.quantize())):
        (tmp_path / name).mkdir()
        mask.save(tmp_path / name / "a.png")
        assert torch.equal(load_masks(tmp_path / name, batch)[0], expected), name


def test_a_mask_of_the_photographs_own_name_comes_before_colmaps(tmp_path: Path) -> None:
    (tmp_path / "a.jpg.png").touch()
    assert _find(tmp_path, "a.jpg") == tmp_path / "a.jpg.png"
    (tmp_path / "a.png").touch()
    assert _find(tmp_path, "a.jpg") == tmp_path / "a.png"


def test_a_mask_may_have_its_suffix_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").touch()
    assert _find(tmp_path, "a.JPG") == tmp_path / "a.PNG"


def test_a_mask_is_of_one_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert find_masks(tmp_path, ["a.jpg", "a.jpg"]) == [tmp_path / "a.png"] * 2
    with pytest.raises(ValueError, match=r"a.png may belong to a.jpg or a.png; name the masks a.jpg.png and a.png.png"):
        find_masks(tmp_path, ["a.jpg", "a.png"])
    (tmp_path / "a.png").rename(tmp_path / "a.jpg.png")
    (tmp_path / "a.png.png").touch()
    assert find_masks(tmp_path, ["a.jpg", "a.png"]) == [tmp_path / "a.jpg.png", tmp_path / "a.png.png"]
