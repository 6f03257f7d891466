"""Predictions of heads, a few frames at a time, and their memory."""

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
    """Memory of heads, in bytes.

    Attributes:
        work: Per frame in a chunk.
        outputs: Per frame, until the end.
        joined: Per frame, while the chunks of all frames are concatenated.
        read_at_once: Per frame, while something is read from all frames on the device.
        stays: Per frame, intermediates that are made chunk by chunk and stay on the device until all are read at once.
    """

    work: float
    outputs: float
    joined: float
    read_at_once: float = 0.0
    stays: float = 0.0

    def beside(self, other: HeadBytes) -> HeadBytes:
        """These heads and then others, while the outputs of these still exist."""
        return HeadBytes(
            work=max(self.work, other.work),
            outputs=self.outputs + other.outputs,
            joined=max(self.joined, self.outputs + other.joined),
            read_at_once=max(self.read_at_once, other.read_at_once),
            stays=max(self.stays, other.stays),
        )

    def at_most(self, frames: int, plan: MemoryPlan | None, cuda: bool) -> float:
        """Peak for S frames on the device, without the features."""
        at_a_time = min(frames, HEAD_FRAMES if plan is None else min(HEAD_FRAMES, plan.frames))
        if plan is not None and cuda:  # they leave as they are made
            made = at_a_time * (self.work + self.outputs) + frames * self.stays
            return max(made, frames * self.read_at_once)
        whole = max(self.joined, self.outputs + self.read_at_once)
        return max(at_a_time * self.work + frames * (self.outputs + self.stays), frames * whole)


class Outputs:
    """Predictions of consecutive frames, concatenated.

    Args:
        frames: Total number of frames.
        leave: Whether each part is moved to its place in host memory as soon as it is computed.
    """

    def __init__(self, frames: int, *, leave: bool) -> None:
        self.frames, self.leave = frames, leave
        self._parts: list[Tensor] = []
        self._whole: Tensor | None = None
        self._count = 0

    def add(self, part: Tensor) -> None:  # [B, n, ...]
        """Add the next frames."""
        if not self.leave:
            self._parts.append(part)
            return
        if self._whole is None:
            shape = (len(part), self.frames, *part.shape[2:])
            self._whole = torch.empty(shape, dtype=part.dtype, device="cpu" if part.is_cuda else part.device)
        self._whole[:, self._count : self._count + part.shape[1]] = part
        self._count += part.shape[1]

    def whole(self) -> Tensor:  # [B, S, ...]
        """The predictions of all frames."""
        if self._whole is not None:
            return self._whole
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)


def in_chunks(
    features: Tensor | KeptLayer,  # [B, S, P, 2 * C]
    count: int,
    run: Callable[[Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:  # [B, S, ...] each
    """Outputs of a function on chunks of frames [n, P, 2 * C], equally many of every scene; concatenated."""
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
    """Outputs [n, ...] of a function on chunks of frames of every scene, concatenated.

    Args:
        shape: Scenes and frames.
        count: Frames of every scene at a time.
        run: Runs on a slice of the frames.
        leave: As in :class:`Outputs`.
    """
    outputs = dict[str, Outputs]()
    for start in range(0, shape[1], count):
        found = run(slice(start, start + count))
        for name, value in found.items():
            outputs.setdefault(name, Outputs(shape[1], leave=leave)).add(value.unflatten(0, (shape[0], -1)))
        del found
    return {name: value.whole() for name, value in outputs.items()}
