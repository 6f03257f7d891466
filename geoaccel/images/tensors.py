"""Images given as a tensor, each frame at its original size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.sources import thin
from geoaccel.images.transform import ImageTransform

OVERSHOOT = 0.1
"""Overshoot beyond [0, 1] from bicubic resizing at sharp edges."""


@dataclass(repr=False)
class TensorBatch:
    """Images given as a tensor, with the interface of `ImageBatch`.

    Attributes:
        images: [S, 3, H, W], floating point in [0, 1].
        names: Generated, one for each frame.
        paths: None for each frame.
        transforms: Identity for each frame.
        left_out, numbers: Empty.
    """

    images: Tensor
    names: list[str]
    paths: list[Path | None]
    transforms: list[ImageTransform]
    left_out: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"TensorBatch of {len(self.names)} images, {list(self.images.shape)}"

    @property
    def valid_mask(self) -> Tensor:  # [S, H, W] bool
        """True everywhere: nothing was padded."""
        return torch.stack([transform.valid_mask() for transform in self.transforms])

    def original(self, index: int) -> Tensor:  # [H, W, 3] uint8
        """One frame as if it were read from a file, RGB."""
        return (self.images[index].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()


def tensor_batch(
    given: Tensor,  # [S, 3, H, W] or [1, S, 3, H, W]
    *,
    fps: float | None = None,
    max_frames: int | None = None,
) -> TensorBatch:
    """Check and wrap a tensor.

    Args:
        given: Floating point in [0, 1], at a size that the model accepts.
        fps: Applies to videos; refused.
        max_frames: Use at most this many images.

    Raises:
        ValueError: If it is not one scene of finite pixels in [0, 1], or `fps` is given.
    """
    images = given[0] if given.ndim == 5 and len(given) == 1 else given
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        shape = list(given.shape)
        raise UserError(f"images are {images.dtype} {shape}; expected one scene, floating point [S, 3, H, W] in [0, 1]")
    if not images.numel():
        raise UserError(f"images {list(given.shape)} have no pixels; give at least one image")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # a NaN fails both
        raise UserError(
            f"pixels range from {low:g} to {high:g}; expected finite values in [0, 1], not normalised; divide by the "
            "maximum, or undo the normalisation"
        )
    if fps is not None:
        raise UserError(f"fps={fps:g} applies only to videos, not to tensors; use max_frames to take fewer")
    images = images[thin(list(range(len(images))), max_frames)]
    size = (images.shape[2], images.shape[3])
    transform = ImageTransform(original_size=size, network_size=size, scale=(1.0, 1.0), offset=(0.0, 0.0))
    names = [f"frame_{i:04d}.png" for i in range(len(images))]
    return TensorBatch(images, names, [None] * len(names), [transform] * len(names))
