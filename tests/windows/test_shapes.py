"""Which images have the shape of the others, by the heads of their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.images.read import read_image, upright_size
from geoaccel.images.resize import SHARED, fit, network_size
from geoaccel.images.sources import MemoryPicture, list_pictures
from geoaccel.windows.frames import Line, read_chunk
from geoaccel.windows.identity import of_pictures
from geoaccel.windows.shapes import of_one_shape


def turned(path: Path, size: tuple[int, int], orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 9, 9)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_upright_pictures(kind: str, orientation: int, tmp_path: Path) -> None:
    path = turned(tmp_path / f"a.{kind}", (40, 30), orientation)
    assert upright_size(path) == read_image(path).size == ((30, 40) if orientation > 4 else (40, 30))


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for kind in ("jpg", "png"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:50_000])
        assert upright_size(path) == (400, 300)


@pytest.mark.parametrize("mode", ["crop", "pad", "budget", "long"])
def test_the_network_sees_the_size_that_was_said(mode: str) -> None:
    preprocess = Preprocess(mode, size=56, max_pixels=56 * 42)  # type: ignore[arg-type]
    for width, height in ((40, 30), (30, 40), (640, 479), (33, 99)):
        said = network_size(height, width, preprocess)
        image = Image.new("RGB", (width, height))
        seen = fit(image, preprocess, said if mode in SHARED else None)
        assert seen.transform.network_size == tuple(seen.pixels.shape[1:]) == said


def test_most_images_say_what_the_shape_is(tmp_path: Path) -> None:
    turned(tmp_path / "0.jpg", (40, 30), 6)
    for number in range(1, 5):
        turned(tmp_path / f"{number}.jpg", (40, 30), 1)
    turned(tmp_path / "5.jpg", (80, 60), 1)  # another size, one shape
    turned(tmp_path / "6.jpg", (30, 40), 6)
    turned(tmp_path / "8.jpg", (400, 300), 1)  # as large as images of one reconstruction may not be
    pictures = list_pictures(tmp_path)
    with pytest.raises(
        UserError, match=r"^0.jpg is 30x40, 8.jpg is 400x300, 1.jpg is 40x30: with windows all frames must have"
    ):
        of_one_shape(pictures, Preprocess(size=28), skip_bad=False)
    kept, why = of_one_shape(pictures, Preprocess(size=28), skip_bad=True)
    assert [picture.name for picture in kept] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg"]
    assert why.keys() == {"0.jpg", "8.jpg"}


@pytest.mark.parametrize(
    ("usual", "odd", "named"),
    [
        ((307, 240), [(309, 240)], {"4.png"}),  # within the stretch, but of another network size
        ((400, 300), [(104, 78), (1200, 900)], {"4.png", "5.png"}),  # not 16 times the usual area, but of each other
        ((300, 240), [(296, 240), (304, 240)], set()),  # at either end of the stretch, of one network size
    ],
)
def test_images_that_are_left_go_through_any_window(
    usual: tuple[int, int], odd: list[tuple[int, int]], named: set[str]
) -> None:
    preprocess, sizes = Preprocess("budget", max_pixels=196 * 238), [usual] * 4 + odd
    pictures = [MemoryPicture(Image.new("RGB", size), f"{i}.png") for i, size in enumerate(sizes)]
    kept, why = of_one_shape(pictures, preprocess, skip_bad=True)
    assert why.keys() == named
    for order in (kept, kept[::-1]):
        line = Line({picture.name: i for i, picture in enumerate(order)}, overlap=1)
        for start in range(0, len(order), 2):
            line.next_window(read_chunk(order[start : start + 2], preprocess, skip_bad=False))


@pytest.mark.parametrize("kind", ["no picture", "a link to nowhere"])
def test_a_file_without_a_head_is_one_line_or_stays_to_be_left_out(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        turned(tmp_path / f"{number}.jpg", (40, 30), 1)
    if kind == "no picture":
        (tmp_path / "3.jpg").write_bytes(b"none")
    else:
        (tmp_path / "3.jpg").symlink_to("nowhere.jpg")
    pictures = list_pictures(tmp_path)
    with pytest.raises(UserError, match=r"3.jpg is .*, or leave out such images"):
        of_one_shape(pictures, Preprocess(size=28), skip_bad=False)
    kept, why = of_one_shape(pictures, Preprocess(size=28), skip_bad=True)
    assert (kept, why) == (pictures, {})
    assert of_pictures(kept) != of_pictures(kept[:3])
    assert list(read_chunk(kept, Preprocess(size=28), skip_bad=True).left_out) == ["3.jpg"]


def test_many_are_counted_and_arrays_have_shapes_too() -> None:
    shapes = [(3, 28, 42)] * 6 + [(3, 42, 28)] * 5
    pictures = [MemoryPicture(torch.zeros(shape), f"{i}.png") for i, shape in enumerate(shapes)]
    pictures += [MemoryPicture(np.zeros((28, 42, 3)), "array.png"), MemoryPicture(np.zeros(3), "no.png")]
    with pytest.raises(UserError, match=r"8.png is 28x42, 2 more have other shapes, 0.png is 42x28") as raised:
        of_one_shape(pictures, Preprocess(size=28), skip_bad=False)
    assert "\n" not in str(raised.value)
    assert len(of_one_shape(pictures, Preprocess(size=28), skip_bad=True)[0]) == 8
