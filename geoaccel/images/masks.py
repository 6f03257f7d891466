"""Masks drawn over the photographs, as the network sees them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import pixel_grid
from geoaccel.images.load import ImageBatch
from geoaccel.images.read import IMAGE_SUFFIXES, read_mask
from geoaccel.images.transform import ImageTransform


def load_masks(folder: str | Path, batch: ImageBatch) -> Tensor:  # [S, H, W] bool
    """Read one mask for each photograph and bring it to the network input.

    Args:
        folder: Holds an image of the same name as each photograph, up to the suffix; or with a suffix added, as
            COLMAP writes them (``a.jpg.png`` for ``a.jpg``). Bright (over half) is kept, dark is left out; of a
            picture with transparency, such as a cut-out, what is opaque is kept.
        batch: The photographs; a mask has the size of its photograph.

    Raises:
        FileNotFoundError: If the folder or the mask of a photograph is missing.
        ValueError: If a mask cannot be read or has another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of masks at {folder}")
    masks = []
    for name, transform in zip(batch.names, batch.transforms, strict=True):
        path = _find(folder, name)
        picture = read_mask(path)
        if picture.shape != transform.original_size:
            height, width = transform.original_size
            raise ValueError(
                f"mask {path} is {picture.shape[1]}x{picture.shape[0]}, its photograph {name} is {width}x{height}; "
                "masks have the size of their photographs"
            )
        masks.append(mask_to_network(torch.from_numpy(picture), transform))
    return torch.stack(masks)


def mask_to_network(
    mask: Tensor,  # [H0, W0] bool
    transform: ImageTransform,
) -> Tensor:  # [H, W] bool
    """Look up the photograph's pixel under the centre of every pixel of the network input; False at padding."""
    height, width = transform.original_size
    pixels = transform.pixels_to_original(pixel_grid(*transform.network_size, dtype=torch.float64))
    column = pixels[..., 0].floor().long().clamp(0, width - 1)
    row = pixels[..., 1].floor().long().clamp(0, height - 1)
    return mask[row, column] & transform.valid_mask()


def _find(folder: Path, name: str) -> Path:
    """The mask of a photograph."""
    stem = Path(name).with_suffix("")
    candidates = [folder / f"{base}{suffix}" for base in (stem, name) for suffix in (".png", *IMAGE_SUFFIXES)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no mask for {name} in {folder}; expected {stem}.png or {name}.png")
