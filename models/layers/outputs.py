"""What heads predict a few frames at a time, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.memory_plan import MemoryPlan
from geoaccel.models.layers.kept_layers import KeptLayer, frames_of

HEAD_FRAMES = 8
"""Frames at a time in heads, unless a plan takes fewer."""


@dataclass(frozen=True)
class HeadBytes:
    """What heads take.

    Attributes:
        work: For each frame at a time.
        outputs: For each frame, until the end.
        joined: For each frame, where the chunks of all frames are put together.
        read_at_once: For each frame, where something is read off all frames on the device.
        stays: For each frame, what is made a few frames at a time to be read at once, and waits on the device for it.
    """

    work: float
    outputs: float
    joined: float
    read_at_once: float = 0.0
    stays: float = 0.0

    def beside(self, other: HeadBytes) -> HeadBytes:
        """These heads and then others, while what these have predicted is there."""
        return HeadBytes(
            work=max(self.work, other.work),
            outputs=self.outputs + other.outputs,
            joined=max(self.joined, self.outputs + other.joined),
            read_at_once=max(self.read_at_once, other.read_at_once),
            stays=max(self.stays, other.stays),
        )

    def at_most(self, frames: int, plan: MemoryPlan | None, cuda: bool) -> float:
        """Beside the features, on the device, for S frames."""
        at_a_time = min(frames, HEAD_FRAMES if plan is None else min(HEAD_FRAMES, plan.frames))
        if plan is not None and cuda:  # they leave as they are made
            made = at_a_time * (self.work + self.outputs) + frames * self.stays
            return max(made, frames * self.read_at_once)
        whole = max(self.joined, self.outputs + self.read_at_once)
        return max(at_a_time * self.work + frames * (self.outputs + self.stays), frames * whole)


class Outputs:
    """Predictions of consecutive frames, put together.

    Args:
        frames: How many frames there will be.
        leave: Whether each part goes to host memory as soon as it is there, into the place that it has in the whole.
    """

    def __init__(self, frames: int, *, leave: bool) -> None:
        self.frames, self.leave = frames, leave
        self._parts: list[Tensor] = []
        self._whole: Tensor | None = None
        self._count = 0

    def add(self, part: Tensor) -> None:  # [B, n, ...]
        """The next frames."""
        if not self.leave:
            self._parts.append(part)
            return
        if self._whole is None:
            shape = (len(part), self.frames, *part.shape[2:])
            self._whole = torch.empty(shape, dtype=part.dtype, device="cpu" if part.is_cuda else part.device)
        self._whole[:, self._count : self._count + part.shape[1]] = part
        self._count += part.shape[1]

    def whole(self) -> Tensor:  # [B, S, ...]
        """Those of all frames."""
        if self._whole is not None:
            return self._whole
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)


def in_chunks(
    features: Tensor | KeptLayer,  # [B, S, P, 2 * C]
    count: int,
    run: Callable[[Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:  # [B, S, ...] each
    """What a function makes of so many frames [n, P, 2 * C] at a time, of every scene as many; put together."""
    batch, frames = features.shape[:2]

    def of_frames(chunk: slice) -> dict[str, Tensor]:
        return run(frames_of(features, chunk).flatten(0, 1))

    return joined((batch, frames), max(1, count // batch), of_frames, leave=not isinstance(features, Tensor))


def joined(
    shape: tuple[int, int],  # B, S
    count: int,
    run: Callable[[slice], dict[str, Tensor]],
    *,
    leave: bool,
) -> dict[str, Tensor]:  # [B, S, ...] each
    """What a function makes [n, ...] of so many frames of every scene at a time, put together.

    Args:
        shape: Scenes and frames.
        count: Frames of every scene at a time.
        run: Of a slice of the frames.
        leave: As of :class:`Outputs`.
    """
    outputs = dict[str, Outputs]()
    for start in range(0, shape[1], count):
        found = run(slice(start, start + count))
        for name, value in found.items():
            outputs.setdefault(name, Outputs(shape[1], leave=leave)).add(value.unflatten(0, (shape[0], -1)))
        del found
    return {name: value.whole() for name, value in outputs.items()}
