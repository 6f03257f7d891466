"""One image, from a file or from memory, as upright 8-bit RGB.

Orientation comes from EXIF; transparency is composited on white, and the opacity kept as alpha; 16-bit values are
scaled by their full range (65535 -> 255), never clipped; everything else (greyscale, palette, CMYK, ...) is converted
by PIL.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from geoaccel.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2"),
    *(".avif", ".heic", ".heif", ".hif"),
)
"""Suffixes of files that count as photographs when a folder is searched."""

MAX_PIXELS = 500_000_000
"""Most pixels of one image: 1.5 GB in memory. Pillow's own limit, against untrusted files, is too low for panoramas."""

# Brands after "ftyp" in HEIC files. AVIF, in the same container, is read by Pillow.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ANIMATIONS_AND_PAGES = ("GIF", "PNG", "WEBP", "TIFF")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


Decoded = TypeVar("Decoded")


class PixelRangeError(UserError):
    """The image is intact, but the range of its values is unknown."""


class _NotRead(UserError):
    """Why a possibly intact image is not read."""


def read_image(path: Path, before: Callable[[Image.Image], object] | None = None) -> Image.Image:
    """Decode a file as by :func:`upright`.

    Args:
        path: The file.
        before: Called with the image before its pixels are decoded, when its size is known.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not an image, is truncated, or has values of unknown range.
    """

    def convert(image: Image.Image) -> Image.Image:
        if before is not None:
            before(image)
        return upright(image)

    return _decode(path, convert)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An open image file, whatever its suffix; the pixels are not decoded yet.

    Raises:
        ValueError: It has more than `MAX_PIXELS`, or is HEIC and the package for that is missing.
        UnidentifiedImageError, OSError: It is not an image, or cannot be read.
    """
    with _no_limit_of_pillow, _open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _NotRead(
                f"image {path} is {image.width}x{image.height}, {image.width * image.height / 1e6:.0f} million pixels; "
                f"at most {MAX_PIXELS / 1e6:g} million are allowed; scale it down"
            )
        yield image


def upright_size(path: Path) -> tuple[int, int]:  # (W, H)
    """Size of an image after EXIF rotation. Its pixels are not decoded.

    Raises:
        FileNotFoundError, ValueError: As :func:`read_image`, but for what only the pixels tell.
    """
    return _decode(path, size_upright)


def size_upright(image: Image.Image) -> tuple[int, int]:  # (W, H)
    """Size after :func:`upright`; EXIF data after the pixels of a PNG is ignored."""
    # Not PNG's own method, which decodes the image to find metadata after the pixels.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _TURNED
    width, height = image.size
    tags = getattr(image, "tag_v2", None)
    if tags is not None:  # some versions of Pillow rotate the size of a TIFF before its pixels
        width, height = tags.get(ExifTags.Base.ImageWidth, width), tags.get(ExifTags.Base.ImageLength, height)
    return (height, width) if turned else (width, height)


def read_mask(path: Path) -> np.ndarray:  # [H, W] bool
    """Decode a mask: opaque pixels if it has transparency (a cut-out), else bright ones (over half).

    Raises:
        FileNotFoundError, ValueError: As :func:`read_image`.
    """
    return _decode(path, _to_mask)


def picture_size(path: Path) -> tuple[int, int]:  # (W, H)
    """Size of an image as stored in the file; its pixels are not decoded.

    Raises:
        FileNotFoundError, ValueError: As :func:`read_image`, but for what only the pixels tell.
    """
    return _decode(path, lambda image: image.size)


def pictures_in(image: Image.Image) -> int:
    """Number of images in an open file, of which the first is read; a camera's extra views do not count."""
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATIONS_AND_PAGES else 1


def _decode(path: Path, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    if not path.exists():
        if path.is_symlink():  # a bad image; a missing file, in contrast, may exist on another machine
            raise UserError(f"image {path} is a broken link; repair it, or remove it")
        raise FileNotFoundError(f"image {path} does not exist; check the path")
    try:
        with opened(path) as image:
            return convert(image)
    except _NotRead:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a readable image; convert it to JPEG or PNG, or remove it") from error
    except PixelRangeError as error:
        raise UserError(f"image {path}: {error}") from error
    except PermissionError as error:
        raise UserError(f"image {path} cannot be read (permission denied); change its permissions") from error
    except _DECODE_ERRORS as error:
        raise UserError(
            f"image {path} cannot be decoded ({one_line(error)}); the file is damaged or incomplete: "
            f"copy it again, or remove it"
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to upright 8-bit RGB on white. Decodes the file if necessary.

    If some pixels are transparent the result is RGBA: colours composited on white, with the opacity as alpha.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        if np.asarray(alpha).min() < 255:
            image.putalpha(alpha)
            return image
    return image if image.mode == "RGB" else image.convert("RGB")


def opaque_mask(image: Image.Image) -> np.ndarray | None:  # [H, W] bool
    """Pixels that are more than half opaque in an image of :func:`upright`; None if all are."""
    return np.array(image.getchannel("A")) > 127 if image.mode == "RGBA" else None


def _to_mask(image: Image.Image) -> np.ndarray:
    image = upright(image)
    kept = opaque_mask(image)
    return np.array(image.convert("L")) > 127 if kept is None else kept


def array_to_image(
    array: np.ndarray | Tensor,  # numpy [H, W] or [H, W, 1|3|4]; torch [1|3|4, H, W]
) -> Image.Image:
    """Convert an array in memory to 8-bit RGB on white, as :func:`upright` does.

    Args:
        array: uint8 in [0, 255], uint16 in [0, 65535], or floating point in [0, 1].
    """
    if isinstance(array, Tensor):
        if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
            raise UserError(f"got a tensor of shape {list(array.shape)}; allowed: [3, H, W]; permute or split it")
        tensor = array.detach().cpu().permute(1, 2, 0)
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        values = array
        if values.ndim != 2 and (values.ndim != 3 or values.shape[-1] not in (1, 3, 4)):
            raise UserError(
                f"got an array of shape {list(values.shape)}; allowed: [H, W], [H, W, 3] or [H, W, 4]; transpose it"
            )
    if 0 in values.shape:
        raise UserError(f"got an array of shape {list(array.shape)}, which has no pixels; leave it out")
    values = _to_8bit(values)
    return upright(Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values))


def one_line(error: Any) -> str:
    """First line of an exception's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _to_8bit(values: np.ndarray) -> np.ndarray:
    """Scale by the full range of the type; refuse values out of range."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if np.issubdtype(values.dtype, np.floating):
        # A NaN fails both comparisons.
        if not (values.min() >= 0 and values.max() <= 1):
            raise PixelRangeError(
                f"floating point pixels range from {values.min():g} to {values.max():g}; allowed: finite values in "
                f"[0, 1]; divide by the maximum, or pass uint8"
            )
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer) and values.dtype.itemsize > 1:
        # Older Pillow opens 16-bit PNGs as 32-bit integers.
        if values.min() < 0 or values.max() > 65535:
            raise PixelRangeError(
                f"integer pixels range from {values.min()} to {values.max()}; allowed: 8 bit or 16 bit; convert them"
            )
        return np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    raise PixelRangeError(f"pixels are of type {values.dtype}; allowed: uint8, uint16, or floating point in [0, 1]")


def _open(path: Path) -> Image.Image:
    """Open by content, whatever the suffix."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
            raise
    try:
        # Opened through its own function: registering the plugin would change Pillow for the whole process.
        import pillow_heif
    except ImportError:
        raise _NotRead(
            f"{path} is an HEIC image, which needs pillow-heif: pip install 'geoaccel[heic]', or convert it to JPEG"
        ) from None
    return pillow_heif.open_heif(path).to_pillow()


class _NoLimit:
    """Lifts Pillow's process-wide limit while any of our threads reads, and restores it afterwards."""

    def __init__(self) -> None:
        self._lock, self._readers, self._before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                Image.MAX_IMAGE_PIXELS = self._before


_no_limit_of_pillow = _NoLimit()
