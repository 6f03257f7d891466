"""Masks of images, converted to the network input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.given import ImagesRead
from geoaccel.images.read import IMAGE_SUFFIXES, read_mask


def load_masks(folder: str | Path, batch: ImagesRead) -> Tensor:  # [S, H, W] bool
    """Read one mask for each image and convert it to the network input.

    Args:
        folder: Contains a mask with the name of each image, apart from the suffix, or with a suffix added, as COLMAP
            writes them (``a.jpg.png`` for ``a.jpg``). Bright pixels (over half) are kept, dark ones left out; of masks
            with transparency, such as cut-outs, opaque pixels are kept.
        batch: The images; a mask has the size of its image.

    Raises:
        FileNotFoundError: If the folder or the mask of an image is missing.
        ValueError: If a mask cannot be read or has another size.
    """
    masks = []
    for name, transform, path in zip(batch.names, batch.transforms, find_masks(folder, batch.names), strict=True):
        picture = read_mask(path)
        if picture.shape != transform.original_size:
            height, width = transform.original_size
            raise UserError(
                f"mask {path} is {picture.shape[1]}x{picture.shape[0]}, its image {name} is {width}x{height}; "
                "a mask must have the size of its image"
            )
        masks.append(transform.nearest(torch.from_numpy(picture)))
    return torch.stack(masks)


def find_masks(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The mask file of each image.

    Raises:
        FileNotFoundError: If the folder or one of them is missing.
        ValueError: If one file could be the mask of several images.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of masks {folder} does not exist; check the path")
    found = [_find(folder, name) for name in names]
    image_of: dict[Path, str] = {}
    for name, path in zip(names, found, strict=True):
        if (other := image_of.setdefault(path, name)) != name:
            raise UserError(
                f"mask {path} may belong to {other} or {name}; name the masks {Path(other).name}.png and "
                f"{Path(name).name}.png"
            )
    return found


def _find(folder: Path, name: str) -> Path:
    """The mask of an image."""
    stem = Path(name).with_suffix("")
    for base in (stem, name):
        for suffix in (".png", *IMAGE_SUFFIXES):
            for path in (folder / f"{base}{suffix}", folder / f"{base}{suffix.upper()}"):
                if path.is_file():
                    return path
    raise FileNotFoundError(f"no mask for {name} in {folder}; expected {stem}.png or {name}.png")
