"""Images that are moved to the device and normalised a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from geoaccel.layout import TokenLayout
from geoaccel.memory_plan import MemoryPlan


class NormalisedFrames:
    """The encoder's view of images that stay where they are.

    Args:
        images: [B, S, 3, H, W] in [0, 1], on any device.
        change: Normalises [n, 3, H, W].
        device: Where the encoder runs.
        order: Index of the frame at each position; None: unchanged.
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
        """All frames of all scenes in a row; :meth:`split` does this anyway."""
        return self

    def split(self, count: int) -> Iterator[Tensor]:  # [n, 3, H, W] each
        """``count`` frames at a time, on the device."""
        scenes, frames = self.shape[:2]
        places = [(scene, frame) for scene in range(scenes) for frame in (self.order or range(frames))]
        for start in range(0, len(places), count):
            chosen, ordered = places[start : start + count], self.order is None and scenes == 1
            part = self.images[0, start : start + count] if ordered else torch.stack([self.images[at] for at in chosen])
            yield self.change(part.to(device=self.device, dtype=torch.promote_types(part.dtype, torch.float32)))


def normalised_by(
    images: Tensor,  # [B, S, 3, H, W] in [0, 1]
    change: Callable[[Tensor], Tensor],
    plan: MemoryPlan | None,
    device: torch.device,
) -> Tensor | NormalisedFrames:
    """All images normalised at once; with a plan and without gradients, when an encoder on the device reads them."""
    if plan is None or torch.is_grad_enabled():
        return change(images)
    return NormalisedFrames(images, change, device)


def embedded(
    images: Tensor | NormalisedFrames,  # [B, S, 3, H, W], normalised
    embed: Callable[[Tensor], Tensor],  # [n, 3, H, W] to [n, P, C]
    plan: MemoryPlan | None,
    layout: TokenLayout,
) -> Tensor:  # [B, S, P, C]
    """The first tokens of every frame; with a plan, in its parts."""
    if isinstance(images, Tensor) or plan is None:
        return embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # type: ignore[arg-type]
    out: Tensor | None = None
    start = 0
    for part in images.split(plan.frames_in_blocks(layout.tokens_per_frame)):
        x = embed(part)
        out = x.new_empty(layout.batch * layout.frames, *x.shape[1:]) if out is None else out
        out[start : start + len(x)] = x
        start += len(x)
    assert out is not None
    return out.unflatten(0, images.shape[:2])
