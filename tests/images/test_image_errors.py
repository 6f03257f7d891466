"""Every bad input of loading: one line that says what, and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import SMALL, noise, one_line_of, save
from PIL import Image, ImageFile

from geoaccel.backbone import Preprocess
from geoaccel.images import load_images


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_files_are_named(kind: str, kept: float, tmp_path: Path) -> None:
    progressive = kind == "progressive"
    path = tmp_path / "image.jpg"
    Image.fromarray(noise(120, 160)).save(path, format="JPEG" if progressive else kind, progressive=progressive)
    load_images(path, SMALL)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="remove it") as error:
        load_images(tmp_path, SMALL)
    assert str(path) in one_line_of(error)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_text_file_named_png(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(30, 40))
    for content in ("hello", ""):
        (tmp_path / "b.png").write_text(content)
        with pytest.raises(ValueError, match=r"b\.png is not a readable image") as error:
            load_images(tmp_path, SMALL)
        one_line_of(error)


def test_skip_bad_is_named_only_where_the_caller_has_it(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(30, 40))
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(ValueError, match=r"JPEG or PNG, or remove it$"):
        load_images(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"or remove it, or leave out such images \(--skip-bad, skip_bad=True\)$"):
        load_images(tmp_path, SMALL, skip_bad=False)


def test_values_of_unknown_range_in_a_file(tmp_path: Path) -> None:
    Image.new("F", (60, 40), 7.5).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.* 7\.5 to 7\.5.*\[0, 1\]") as error:
        load_images(tmp_path)
    assert "damaged" not in one_line_of(error)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty") as error:
        load_images(tmp_path)
    one_line_of(error)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no images among its 1 entries; allowed: \.jpg") as error:
        load_images(tmp_path)
    one_line_of(error)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"subfolders are not searched.*photos"):
        load_images(tmp_path)
    (tmp_path / "clip.mp4").write_text("x")
    with pytest.raises(ValueError, match=r"give the file itself.*clip\.mp4"):
        load_images(tmp_path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for source in (tmp_path / "no", str(tmp_path / "*.png"), [tmp_path / "a.png", tmp_path / "b.png"]):
        with pytest.raises(FileNotFoundError) as error:
            load_images(source)
        assert str(tmp_path) in one_line_of(error)
    with pytest.raises(FileNotFoundError, match="'' does not exist"):
        load_images("")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="matches 1 files, but neither images"):
        load_images(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match="contains the folder"):
        load_images([tmp_path, tmp_path])
    (tmp_path / "a.mp4").write_text("x")
    with pytest.raises(ValueError, match="contains the video"):
        load_images([tmp_path / "a.mp4", tmp_path / "a.mp4"])


def test_empty_list() -> None:
    with pytest.raises(ValueError, match="empty"):
        load_images([])
    with pytest.raises(ValueError, match="empty"):
        load_images(torch.zeros(0, 3, 30, 40))


@pytest.mark.parametrize(
    ("second", "preprocess", "message"),
    [
        ((400, 100), SMALL, "differ too much in shape"),
        ((160, 100), Preprocess("budget", max_pixels=20_000), "differ too much in shape"),
        ((500, 666), SMALL, "differ too much in size"),
        ((500, 666), Preprocess("pad", 112), "differ too much in size"),
    ],
)
def test_images_that_do_not_belong_together(second: tuple[int, int], preprocess: Preprocess, message: str) -> None:
    for sizes in ([(120, 160), second], [second, (120, 160)]):
        with pytest.raises(ValueError, match=message) as error:
            load_images([noise(*size) for size in sizes], preprocess)
        text = one_line_of(error)
        assert "160x120" in text
        assert f"{second[1]}x{second[0]}" in text


@pytest.mark.parametrize(
    ("second", "preprocess"),
    [
        ((160, 120), SMALL),  # the same camera, turned
        ((160, 90), SMALL),
        ((400, 100), Preprocess("pad", 112)),
        ((400, 530), SMALL),
    ],
)
def test_images_that_do_belong_together(second: tuple[int, int], preprocess: Preprocess) -> None:
    assert len(load_images([noise(120, 160), noise(*second)], preprocess)) == 2


@pytest.mark.parametrize(("size", "message"), [((13, 100), "one patch"), ((20, 401), "at most 20 times")])
def test_sizes_that_no_network_takes(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_images([noise(*size)])
    assert f"{size[1]}x{size[0]}" in one_line_of(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.full((3, 30, 40), float("nan")), "nan to nan"),
        (torch.full((3, 30, 40), float("inf")), "inf"),
        (torch.full((3, 30, 40), 1.5), "1.5"),
        (torch.full((3, 30, 40), -0.5), "-0.5"),
        (torch.zeros(30, 40, 3), r"allowed: \[3, H, W\]"),
        (torch.zeros(3, 0, 40), "no pixels"),
        (torch.zeros(3, 30, 40, dtype=torch.int32) - 1, "-1 to -1"),
        (torch.zeros(3, 30, 40, dtype=torch.int8), "int8"),
        (np.zeros((3, 30, 40), np.uint8), r"allowed: \[H, W\]"),
        (np.full((30, 40, 3), 255.0), "255"),
        (np.zeros((30, 40), bool), "bool"),
    ],
)
def test_bad_arrays(data: torch.Tensor | np.ndarray, message: str) -> None:
    good = noise(30, 40)
    with pytest.raises(ValueError, match=message) as error:
        load_images([good, data], SMALL)
    assert "image_0001" in one_line_of(error)


def test_things_that_are_no_images() -> None:
    for source in (7, [7], {"a": 1}, b"photos"):
        with pytest.raises(TypeError, match="allowed") as error:
            load_images(source)  # type: ignore[arg-type]
        one_line_of(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": 2}, "fps=2 applies only to videos"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"preprocess": Preprocess(size=100)}, "size=100.*98 or 112"),
        ({"preprocess": Preprocess(size=7)}, "size=7"),
        ({"preprocess": Preprocess(mode="budget", max_pixels=100)}, "max_pixels=100"),
        ({"preprocess": Preprocess(mode="squash")}, "budget, crop, long, pad"),  # type: ignore[arg-type]
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_images([noise(30, 40)], **options)
    one_line_of(error)
