"""Images in: upstream's pixels, every kind of file, every source."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import SMALL, noise, one_line_of, save, smooth, to_uint8
from PIL import Image
from references import DATA
from safetensors import safe_open

from geoaccel.backbone import Preprocess
from geoaccel.export.frames import _stored_upright
from geoaccel.images import load_images, read

GOLDEN = DATA / "preprocess.safetensors"


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
    assert batch.transforms[1].valid_mask().sum().item() == 518 * crop.shape[1]
    assert batch.valid_mask[0].all()
    opaque = torch.from_numpy(landscape[..., 3] > 127)
    assert torch.equal(batch.valid_mask[1], batch.transforms[1].nearest(opaque))


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


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (280, 504)), ((1920, 1080), (504, 280)), ((100, 100), (504, 504)), ((378, 504), (378, 504))],
)
def test_long_follows_depth_anything_3(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The long side has 504 pixels; the other the nearest 14, halves up: 283.5 rounds to 284, and that to 280."""
    batch = load_images([noise(*size), noise(*size)], Preprocess(mode="long", size=504))
    assert batch.images.shape[-2:] == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_an_animation_the_first_picture_is_used_and_that_is_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, other, alone = (Image.fromarray(noise(60, 80, seed=seed)) for seed in range(3))
    alone.save(tmp_path / "a.png")
    first.save(tmp_path / f"b.{kind.lower()}", format=kind, save_all=True, append_images=[other])
    with Image.open(tmp_path / f"b.{kind.lower()}") as image:
        assert getattr(image, "n_frames", 1) == 2
        expected = np.asarray(image.convert("RGB"))
    batch = load_images([tmp_path / "a.png", tmp_path / f"b.{kind.lower()}"], SMALL)
    assert np.array_equal(batch.original(1).numpy(), expected)
    said = [one for one in caplog.messages if "animations" in one]
    if kind == "MPO":  # a camera's second view, or a preview
        assert not said
    else:
        (line,) = said
        assert f"1 of 2 files are animations or have several pages, first b.{kind.lower()}; only the first" in line


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


# ---- Kinds of pictures


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


@pytest.mark.parametrize("mode", ["crop", "pad", "budget", "long"])
def test_what_is_transparent_is_not_seen(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Colours are those of a picture on white, file or array; the rest of the canvas is not valid."""
    caplog.set_level(logging.INFO)
    pixels = noise(80, 56, 4)
    pixels[..., 3] = 255
    pixels[20:45, 8:40, 3] = 0
    pixels[45:50, 8:40, 3] = 200  # more opaque than not
    white = np.where(pixels[..., 3:] == 0, 255, pixels[..., :3]).astype(np.uint8)
    white[45:50, 8:40] = np.rint((pixels[45:50, 8:40, :3] * 200.0 + 255 * 55) / 255)
    rule = Preprocess(mode, 56, 14, max_pixels=56 * 56)  # type: ignore[arg-type]
    cut, plain = save(tmp_path / "cut.png", pixels), load_images([white], rule)
    assert "transparent" not in caplog.text
    for batch in (load_images(cut, rule), load_images([pixels], rule), load_images([Image.open(cut)], rule)):
        assert (batch.images - plain.images).abs().max() < 0.008
        assert (batch.original(0).float() - torch.from_numpy(white).float()).abs().max() <= 1
        expected = batch.transforms[0].nearest(torch.from_numpy(pixels[..., 3] > 127))
        assert torch.equal(batch.valid_mask[0], expected)
        assert 0.1 < (plain.valid_mask & ~batch.valid_mask).float().mean() < 0.3
    assert caplog.text.count("1 of 1 images are transparent in places; nothing is reconstructed there") == 3
    assert "everywhere" not in caplog.text
    # Padded beside a picture of another shape, what is opaque moves along with its pixels.
    both = load_images([pixels, noise(56, 80)], Preprocess("crop", 56, 14))
    assert torch.equal(both.valid_mask[0], both.transforms[0].nearest(torch.from_numpy(pixels[..., 3] > 127)))
    assert both.valid_mask[1].sum() == both.transforms[1].valid_mask().sum()


def test_pictures_without_anything_opaque_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, opacity in (("a", 255), ("b", 0), ("c", 0)):
        pixels = noise(56, 56, 4)
        pixels[..., 3] = opacity
        save(tmp_path / f"{name}.png", pixels)
    batch = load_images(tmp_path, Preprocess("crop", 56, 14))
    assert batch.valid_mask.flatten(1).any(1).tolist() == [True, False, False]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == "2 of 3 images are transparent everywhere, first b.png"


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


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.jpg", "IMG_1"])
def test_content_decides_and_not_the_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Phones and messengers rename what they convert."""
    path, shown = tmp_path / name, Image.fromarray(smooth(48, 80))
    shown.save(path, format="PNG")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert torch.equal(load_images(path, SMALL).original(0), torch.from_numpy(smooth(48, 80)))
    path.write_bytes(b"\0\0\0\x18ftypmif1" + bytes(40))
    with pytest.raises(ValueError, match=r"is an HEIC image.*pip install 'geoaccel\[heic\]'") as error:
        load_images(path, SMALL)
    assert str(path) in one_line_of(error)
    reader = SimpleNamespace(open_heif=lambda given: SimpleNamespace(to_pillow={path: shown}[given].copy))
    monkeypatch.setitem(sys.modules, "pillow_heif", reader)
    assert torch.equal(load_images(path, SMALL).original(0), torch.from_numpy(smooth(48, 80)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_beyond_the_limit_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Read without a warning, up to a limit of ours that the refusal names; Pillow's own is as before."""
    path = tmp_path / "panorama"
    Image.fromarray(smooth(100, 200)).save(path, format=form)
    for limit in (15_000, 1_000):  # Pillow would warn, then refuse
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert load_images(path, SMALL).transforms[0].original_size == (100, 200)
        assert _stored_upright(path, (100, 200))
        assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(read, "MAX_PIXELS", 19_999)
    with pytest.raises(ValueError, match=r"is 200x100, 0 million pixels; at most 0\.019999 million are"):
        load_images(path, SMALL)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_heif(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(smooth(48, 80))).save(tmp_path / "photo.heic", quality=95)
    difference = load_images(tmp_path, SMALL).original(0).int() - torch.from_numpy(smooth(48, 80)).int()
    assert difference.abs().max() < 12
