"""Images that are brought to the device and normalised a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class NormalisedFrames:
    """What the encoder sees of images that stay where they are.

    Args:
        images: [B, S, 3, H, W] in [0, 1], on any device.
        change: What normalises [n, 3, H, W] of them.
        device: Where the encoder runs.
        order: Frame of each place; None: as they are.
    """

    def __init__(
        self,
        images: Tensor,
        change: Callable[[Tensor], Tensor],
        device: torch.device,
        order: list[int] | None = None,
    ) -> None:
        self.images, self.change, self.device, self.order = images, change, device, order

    @property
    def shape(self) -> torch.Size:
        """[B, S, 3, H, W]."""
        return self.images.shape

    def reordered(self, order: Tensor) -> NormalisedFrames:
        """The same frames in another order [S]."""
        return NormalisedFrames(self.images, self.change, self.device, order.tolist())

    def flatten(self, start: int, end: int) -> NormalisedFrames:
        """All frames of all scenes in a row; they are split like that anyway."""
        return self

    def split(self, count: int) -> Iterator[Tensor]:  # [n, 3, H, W] each
        """So many frames at a time, on the device."""
        scenes, frames = self.shape[:2]
        places = [(scene, frame) for scene in range(scenes) for frame in (self.order or range(frames))]
        for start in range(0, len(places), count):
            chosen, ordered = places[start : start + count], self.order is None and scenes == 1
            part = self.images[0, start : start + count] if ordered else torch.stack([self.images[at] for at in chosen])
            yield self.change(part.to(device=self.device, dtype=torch.promote_types(part.dtype, torch.float32)))
