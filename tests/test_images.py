"""Images in: upstream's pixels, every kind of file, the way back, and every bad input."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors import safe_open

from geoaccel import cameras
from geoaccel.backbone import Preprocess
from geoaccel.images import ImageTransform, load_images, natural_key

GOLDEN = Path(__file__).parent / "data" / "preprocess.safetensors"
PHOTOGRAPHS = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SMALL = Preprocess(size=112)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards."""
    v, u = np.mgrid[:height, :width]
    return np.stack([255 * u / (width - 1), 255 * v / (height - 1), np.full((height, width), 60)], -1).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def one_line_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- upstream's pixels


def golden(name: str) -> torch.Tensor:
    with safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("name", ["landscape_rgba", "portrait", "wide"])
def test_equals_upstream_to_the_pixel(name: str, mode: str, tmp_path: Path) -> None:
    array = golden(f"{name}.input").numpy()
    expected = golden(f"{name}.{mode}")
    path = save(tmp_path / "image.png", array)
    for source in (path, [array], torch.from_numpy(array).permute(2, 0, 1)):
        batch = load_images(source, Preprocess(mode=mode))
        torch.testing.assert_close(batch.images[0], expected.float() / 255, rtol=0, atol=0)


def test_mixed_shapes_are_padded_white_and_centred_like_upstream() -> None:
    portrait, landscape = golden("portrait.input").numpy(), golden("landscape_rgba.input").numpy()
    batch = load_images([portrait, landscape])
    assert list(batch.images.shape) == [2, 3, 518, 518]
    crop = golden("landscape_rgba.crop")
    top = (518 - crop.shape[1]) // 2
    images = to_uint8(batch.images)
    assert torch.equal(images[0], golden("portrait.crop"))
    assert torch.equal(images[1, :, top : top + crop.shape[1]], crop)
    assert (images[1, :, :top] == 255).all()
    assert (images[1, :, top + crop.shape[1] :] == 255).all()
    assert batch.transforms[1].content_box == (0, top, 518, top + crop.shape[1])
    assert batch.valid_mask.sum().item() == 518 * 518 + 518 * crop.shape[1]


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "expected"),
    [
        # 4:3: 583.1 x 437.3 -> 42 x 31 patches = 588 x 434 = 255192, one too many; 42/31 > 4/3, so columns go.
        (480, 640, 255_000, (434, 574)),
        (640, 480, 255_000, (574, 434)),
        # 504.98 -> 36 patches.
        (300, 300, 255_000, (504, 504)),
        # 20:1 within 3 patches.
        (20, 400, 588, (14, 42)),
    ],
)
def test_budget_follows_pi3(height: int, width: int, max_pixels: int, expected: tuple[int, int]) -> None:
    array = noise(height, width)
    batch = load_images([array], Preprocess(mode="budget", max_pixels=max_pixels))
    assert batch.transforms[0].network_size == expected
    reference = Image.fromarray(array).resize(expected[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(to_uint8(batch.images[0]).permute(1, 2, 0).numpy(), np.asarray(reference))


def test_budget_stretches_to_the_first_aspect_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    budget = Preprocess(mode="budget")
    with caplog.at_level(logging.WARNING):
        load_images([noise(90, 120), noise(60, 80)], budget)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        batch = load_images([noise(90, 120), noise(90, 90)], budget)
    assert "stretches 1 of 2 images" in caplog.text
    stretched = batch.transforms[1]
    assert stretched.content_box == (0, 0, stretched.network_size[1], stretched.network_size[0])
    assert stretched.scale[0] / stretched.scale[1] == pytest.approx(120 / 90, rel=0.02)


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        (Preprocess("crop", 112), (84, 112)),
        (Preprocess("crop", 128, 16), (96, 128)),
        (Preprocess("pad", 224), (224, 224)),
    ],
)
def test_other_sizes_and_patches(preprocess: Preprocess, size: tuple[int, int]) -> None:
    assert load_images([noise(60, 80)], preprocess).images.shape[-2:] == size


# ---------------------------------------------------------------------------------------------- kinds of pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(smooth(48, 80))
    # What the camera stored, so that showing it with this orientation gives `upright` again.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    batch = load_images(tmp_path, SMALL)
    assert batch.transforms[0].original_size == (48, 80)
    assert torch.equal(batch.original(0), torch.from_numpy(np.array(upright)))
    assert torch.equal(batch.images, load_images([np.asarray(upright)], SMALL).images)


def colour_at_centre(path: Path) -> list[int]:
    original = load_images(path, SMALL).original(0)
    return original[original.shape[0] // 2, original.shape[1] // 2].tolist()


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    # 200 * 128/255 + 255 * 127/255, and 0 + 127.
    assert colour_at_centre(save(tmp_path / "rgba.png", rgba)) == pytest.approx([227, 127, 127], abs=1)
    assert colour_at_centre(save(tmp_path / "la.png", rgba[..., 2:])) == pytest.approx([127, 127, 127], abs=1)
    palette = Image.new("P", (60, 40), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "opaque.png")
    assert colour_at_centre(tmp_path / "opaque.png") == [40, 50, 60]
    palette.save(tmp_path / "clear.png", transparency=1)
    assert colour_at_centre(tmp_path / "clear.png") == [255, 255, 255]


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.full((40, 60), 32768, np.uint16)
    deep[0, 0] = 65535
    assert colour_at_centre(save(tmp_path / "deep.png", deep)) == [128, 128, 128]
    assert colour_at_centre(save(tmp_path / "deep.tif", deep)) == [128, 128, 128]
    assert load_images([deep], SMALL).original(0)[20, 30].tolist() == [128, 128, 128]


def test_other_modes(tmp_path: Path) -> None:
    assert colour_at_centre(save(tmp_path / "grey.png", np.full((40, 60), 77, np.uint8))) == [77, 77, 77]
    Image.new("1", (60, 40), 1).save(tmp_path / "bilevel.png")
    assert colour_at_centre(tmp_path / "bilevel.png") == [255, 255, 255]
    Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert colour_at_centre(tmp_path / "cmyk.jpg") == pytest.approx([254, 0, 0], abs=3)
    Image.new("F", (60, 40), 0.5).save(tmp_path / "float.tif")
    assert colour_at_centre(tmp_path / "float.tif") == [128, 128, 128]


def test_arrays_of_every_kind_are_the_same_picture() -> None:
    array = noise(40, 60)
    reference = load_images([array], SMALL).images
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for same in (
        Image.fromarray(array),
        array.astype(np.float32) / 255,
        array.astype(np.uint16) * 257,
        tensor,
        tensor.double() / 255,
        tensor[None],
        array[None],
    ):
        assert torch.equal(load_images(same, SMALL).images, reference)


def test_heif_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="pillow-heif") as error:
        load_images(tmp_path)
    assert "photo.heic" in one_line_of(error)


def test_heif(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(smooth(48, 80))).save(tmp_path / "photo.heic", quality=95)
    difference = load_images(tmp_path, SMALL).original(0).int() - torch.from_numpy(smooth(48, 80)).int()
    assert difference.abs().max() < 12


# ---------------------------------------------------------------------------------------------- sources


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


# ---------------------------------------------------------------------------------------------- the way back

CASES = [
    pytest.param((300, 400), Preprocess("crop", 112), id="landscape"),
    pytest.param((400, 300), Preprocess("crop", 112), id="portrait-cropped"),
    pytest.param((77, 91), Preprocess("crop", 224), id="enlarged"),
    pytest.param((300, 401), Preprocess("pad", 112), id="pad-rows"),
    pytest.param((401, 300), Preprocess("pad", 112), id="pad-columns"),
    pytest.param((300, 400), Preprocess("budget", max_pixels=20_000), id="budget"),
]


def transform_of(size: tuple[int, int], preprocess: Preprocess) -> ImageTransform:
    return load_images([noise(*size)], preprocess).transforms[0]


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_a_checker_corner_lands_where_the_transform_says(size: tuple[int, int], preprocess: Preprocess) -> None:
    height, width = size
    corner_u, corner_v = int(width * 0.45), int(height * 0.55)
    array = np.zeros((height, width, 3), np.uint8)
    array[:, corner_u:, 0] = 255
    array[corner_v:, :, 1] = 255
    batch = load_images([array], preprocess)
    transform = batch.transforms[0]
    u, v = transform.pixels_to_network(torch.tensor([corner_u, corner_v], dtype=torch.float64)).tolist()
    left, top, right, bottom = transform.content_box
    # An edge at u covers right - u pixels of every row.
    middle_row = batch.images[0, 0, (top + bottom) // 2, left:right].double().sum().item()
    middle_column = batch.images[0, 1, top:bottom, (left + right) // 2].double().sum().item()
    assert right - middle_row == pytest.approx(u, abs=0.05)
    assert bottom - middle_column == pytest.approx(v, abs=0.05)


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_pixels_and_intrinsics_agree_both_ways(size: tuple[int, int], preprocess: Preprocess) -> None:
    transform = transform_of(size, preprocess)
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[310.0, 0.7, 205.0], [0.0, 305.0, 140.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.0, 6.0])

    def project(matrix: torch.Tensor) -> torch.Tensor:
        pixels = points @ matrix.T
        return pixels[:, :2] / pixels[:, 2:]

    network = transform.intrinsics_to_network(intrinsics)
    torch.testing.assert_close(project(network), transform.pixels_to_network(project(intrinsics)))
    torch.testing.assert_close(project(intrinsics), transform.pixels_to_original(project(network)))
    torch.testing.assert_close(transform.intrinsics_to_original(network), intrinsics)
    batched = transform.intrinsics_to_original(network.expand(2, 5, 3, 3))
    torch.testing.assert_close(batched, intrinsics.expand(2, 5, 3, 3))


def plane_depth(
    size: tuple[int, int],
    intrinsics: torch.Tensor,  # [3, 3]
) -> torch.Tensor:  # [H, W]
    """z-depth of the slanted plane n.x = 2."""
    pixels = cameras.pixel_grid(*size, dtype=torch.float64)
    rays = cameras.unproject_depth(torch.ones(size, dtype=torch.float64), intrinsics)
    assert rays.shape[:2] == pixels.shape[:2]
    return 2.0 / (rays @ torch.tensor([0.25, -0.2, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_depth_of_a_plane_at_original_resolution(size: tuple[int, int], preprocess: Preprocess) -> None:
    transform = transform_of(size, preprocess)
    intrinsics = torch.tensor(
        [[350.0, 0.0, size[1] / 2 + 3], [0.0, 350.0, size[0] / 2 - 5], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    predicted = plane_depth(transform.network_size, transform.intrinsics_to_network(intrinsics))
    # Nonsense at padding must not reach the photograph.
    predicted = predicted.where(transform.valid_mask(), 1e6)
    depth = transform.depth_to_original(predicted)
    seen = transform.seen_mask()
    assert depth.shape == size == seen.shape
    assert (depth[~seen] == 0).all()
    # Half a network pixel at the border is held constant; inside, only the plane's curvature in 1/z is left.
    step = max(1 / scale for scale in transform.scale)
    expected = plane_depth(size, intrinsics)
    assert ((depth - expected).abs()[seen] < 0.002 * step * expected[seen]).all()
    points = cameras.unproject_depth(depth, intrinsics)[seen]
    on_plane = points @ torch.tensor([0.25, -0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(on_plane, torch.full_like(on_plane, 2.0), rtol=0.002 * step, atol=0)
    assert torch.equal(
        transform.conf_to_original(predicted.float()[None])[0], transform.depth_to_original(predicted.float())
    )


def test_cropped_rows_are_unknown() -> None:
    transform = transform_of((400, 300), Preprocess("crop", 112))
    # 400 * 112/300 = 149.3 -> 154 rows, of which 21 go above and below: 54.5 original rows.
    assert transform.offset == (0.0, -21.0)
    seen = transform.seen_mask()
    assert seen.all(dim=1).nonzero().flatten()[[0, -1]].tolist() == [55, 344]
    assert transform.valid_mask().all()


def test_a_smaller_original_than_network_input() -> None:
    transform = transform_of((30, 40), Preprocess("pad", 112))
    assert transform.seen_mask().all()
    depth = torch.full((112, 112), 9.0)
    depth[transform.valid_mask()] = 2.0
    assert (transform.depth_to_original(depth) == 2.0).all()


def test_depth_of_another_size_is_refused() -> None:
    transform = transform_of((30, 40), SMALL)
    with pytest.raises(ValueError, match=r"\[84, 111\].*\[\.\.\., 84, 112\]") as error:
        transform.depth_to_original(torch.ones(84, 111))
    one_line_of(error)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the shared photographs are not here")
@pytest.mark.parametrize("scene", ["co3d_apple", "alicevision_buddha", "7scenes_redkitchen"])
def test_real_photographs(scene: str) -> None:
    folder = PHOTOGRAPHS / scene
    batch = load_images(folder, max_frames=3)
    assert batch.images.shape[0] == 3
    assert batch.images.shape[-1] == 518
    assert batch.images.shape[-2] % 14 == 0
    assert json.loads((folder / "poses.json").read_text())
    for i, transform in enumerate(batch.transforms):
        original = batch.original(i).permute(2, 0, 1).float() / 255
        # The photograph, mapped to the network and back, is the photograph up to the resampling.
        back = transform.depth_to_original(batch.images[i])
        assert (back - original).abs()[:, transform.seen_mask()].mean() < 0.03


# ---------------------------------------------------------------------------------------------- bad input


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
        with pytest.raises(ValueError, match=r"b\.png is not an image") as error:
            load_images(tmp_path, SMALL)
        one_line_of(error)


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
    with pytest.raises(ValueError, match=r"name the file itself.*clip\.mp4"):
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
    with pytest.raises(ValueError, match="holds the folder"):
        load_images([tmp_path, tmp_path])
    (tmp_path / "a.mp4").write_text("x")
    with pytest.raises(ValueError, match="holds the video"):
        load_images([tmp_path / "a.mp4", tmp_path / "a.mp4"])


def test_empty_list() -> None:
    with pytest.raises(ValueError, match="empty"):
        load_images([])
    with pytest.raises(ValueError, match="empty"):
        load_images(torch.zeros(0, 3, 30, 40))


@pytest.mark.parametrize(
    ("second", "preprocess", "message"),
    [
        ((400, 100), SMALL, "too different shapes"),
        ((160, 100), Preprocess("budget", max_pixels=20_000), "too different shapes"),
        ((500, 666), SMALL, "too different sizes"),
        ((500, 666), Preprocess("pad", 112), "too different sizes"),
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
        ({"fps": 2}, "fps=2 is for videos"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"preprocess": Preprocess(size=100)}, "size=100.*98 or 112"),
        ({"preprocess": Preprocess(size=7)}, "size=7"),
        ({"preprocess": Preprocess(mode="budget", max_pixels=100)}, "max_pixels=100"),
        ({"preprocess": Preprocess(mode="squash")}, "budget, crop, pad"),  # type: ignore[arg-type]
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_images([noise(30, 40)], **options)
    one_line_of(error)
