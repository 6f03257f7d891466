"""Resizing, cropping and padding of images as each backbone does it, to the pixel.

Everything here works on 8-bit RGB with PIL's filters, as VGGT and pi3 do: another resampling library, or float instead
of 8 bit, gives other pixels. ``crop`` and ``pad`` are VGGT's two modes, ``budget`` is pi3's. ``long`` has the sizes of
Depth Anything 3, not its filters, which are OpenCV's in two steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.images.read import opaque_mask
from geoaccel.images.transform import ImageTransform

MAX_ELONGATION = 20
"""Largest ratio of the sides of a perspective image."""

SHARED = ("budget", "long")
"""Modes in which all images of a reconstruction get the size of the first."""

_WHITE = 255


@dataclass(frozen=True)
class Fitted:
    """One image ready for the network.

    Attributes:
        pixels: uint8 [3, H, W].
        transform: Transform from the original image.
        opaque: bool [H, W], opaque pixels of the image; None if all are.
    """

    pixels: Tensor
    transform: ImageTransform
    opaque: Tensor | None = None


def check_preprocess(preprocess: Preprocess) -> None:
    """Refuse sizes that are not whole numbers of patches."""
    patch = preprocess.patch_size
    if preprocess.mode not in ("crop", "pad", *SHARED):
        raise UserError(f"unknown preprocess mode {preprocess.mode!r}; known: budget, crop, long, pad")
    if patch < 1:
        raise UserError(f"patch_size={patch} must be at least 1")
    if preprocess.mode == "budget":
        if preprocess.max_pixels < patch * patch:
            raise UserError(f"max_pixels={preprocess.max_pixels} is less than one patch of {patch}x{patch}; raise it")
    elif preprocess.size < patch or preprocess.size % patch:
        below = max(1, preprocess.size // patch) * patch
        raise UserError(
            f"size={preprocess.size} is not a multiple of patch_size={patch}; use {below} or {below + patch} instead"
        )


def shared_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """(H, W) of whole patches for all images, by the size of the first: with ``long`` its long side is ``size``."""
    if preprocess.mode == "budget":
        return budget_size(height, width, preprocess)
    scale = preprocess.size / max(height, width)
    # Halves round up here, as upstream.
    rows, columns = (max(1, math.floor(round(side * scale) / preprocess.patch_size + 0.5)) for side in (height, width))
    return rows * preprocess.patch_size, columns * preprocess.patch_size


def budget_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Largest (H, W) of whole patches within ``max_pixels`` that is close to the given aspect (pi3)."""
    patch, limit = preprocess.patch_size, preprocess.max_pixels
    scale = math.sqrt(limit / (width * height))
    ideal_width, ideal_height = width * scale, height * scale
    columns, rows = max(1, round(ideal_width / patch)), max(1, round(ideal_height / patch))
    while (columns * patch) * (rows * patch) > limit:
        too_wide = columns / rows > ideal_width / ideal_height
        if rows == 1 or (columns > 1 and too_wide):
            columns -= 1
        else:
            rows -= 1
    return rows * patch, columns * patch


def network_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """(H, W) of the network input for a single image of (height, width)."""
    if preprocess.mode in SHARED:
        return shared_size(height, width, preprocess)
    if preprocess.mode == "pad":
        return preprocess.size, preprocess.size
    rows, columns = _scaled(height, width, preprocess)
    return min(rows, preprocess.size), columns


def _scaled(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """(H, W) before rows are cropped or padding is added."""
    if preprocess.mode == "pad" and height > width:
        return preprocess.size, _patches(width * (preprocess.size / height), preprocess.patch_size)
    return _patches(height * (preprocess.size / width), preprocess.patch_size), preprocess.size


def fit(
    image: Image.Image,  # RGB, or RGBA with colours on white
    preprocess: Preprocess,
    budget: tuple[int, int] | None = None,
) -> Fitted:
    """Resize one image, then crop or pad it.

    Args:
        image: 8-bit, already oriented.
        preprocess: The backbone's rule.
        budget: (H, W) shared by all images of the reconstruction; needed by ``budget`` and ``long``.
    """
    width, height = image.size
    if preprocess.mode in SHARED:
        assert budget is not None
        new_height, new_width = budget
    else:
        new_height, new_width = _scaled(height, width, preprocess)

    method = Image.Resampling.LANCZOS if preprocess.mode == "budget" else Image.Resampling.BICUBIC
    colours = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image
    resized = colours.resize((new_width, new_height), method)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    fitted = Fitted(
        pixels.contiguous(),
        ImageTransform((height, width), (new_height, new_width), (new_width / width, new_height / height), (0.0, 0.0)),
    )
    if preprocess.mode == "crop" and new_height > preprocess.size:
        fitted = _crop_rows(fitted, preprocess.size)
    if (kept := opaque_mask(image)) is not None:
        fitted = replace(fitted, opaque=fitted.transform.nearest(torch.from_numpy(kept)))
    return pad_to(fitted, preprocess.size, preprocess.size) if preprocess.mode == "pad" else fitted


def pad_to(fitted: Fitted, height: int, width: int) -> Fitted:
    """Centre an image on a white canvas of (height, width)."""
    old_height, old_width = fitted.transform.network_size
    if (old_height, old_width) == (height, width):
        return fitted
    top, left = (height - old_height) // 2, (width - old_width) // 2
    canvas = fitted.pixels.new_full((3, height, width), _WHITE)
    canvas[:, top : top + old_height, left : left + old_width] = fitted.pixels
    offset_x, offset_y = fitted.transform.offset
    moved = replace(fitted.transform, network_size=(height, width), offset=(offset_x + left, offset_y + top))
    opaque = fitted.opaque
    if opaque is not None:
        opaque = F.pad(opaque, (left, width - old_width - left, top, height - old_height - top))
    return Fitted(canvas, moved, opaque)


def _crop_rows(fitted: Fitted, height: int) -> Fitted:
    """Keep the middle ``height`` rows."""
    start = (fitted.transform.network_size[0] - height) // 2
    pixels = fitted.pixels[:, start : start + height].contiguous()
    width = fitted.transform.network_size[1]
    return Fitted(pixels, replace(fitted.transform, network_size=(height, width), offset=(0.0, -float(start))))


def _patches(length: float, patch: int) -> int:
    """Nearest whole number of patches, at least one, in pixels; halves round to even, as upstream."""
    return max(1, round(length / patch)) * patch
