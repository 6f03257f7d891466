"""The layers that heads read, if the residual stream is changed in place: copies, on the device or the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopies:
    """Asynchronous copies to host memory during one forward.

    A tensor being copied must not be changed before :meth:`settle`; it may be released.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def copy(self, x: Tensor) -> Tensor:
        """A copy in pinned memory; an ordinary copy if the tensor is on the host already."""
        if not x.is_cuda:
            return x.clone()
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        if self._stream is None:
            self._device, self._stream = x.device, torch.cuda.Stream(x.device)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)  # otherwise its memory is reused once nothing else holds it
        self._event = self._stream.record_event()
        return host

    def settle(self) -> None:
        """Later work on the device waits for the copies; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._event = None


class KeptLayer:
    """What heads read from one layer: the outputs of two blocks, each [B, S, P, C], concatenated on reading.

    Args:
        device: Where it is read.
        copies: Target of the copies, for an offloaded layer; None: it stays on the device.
    """

    def __init__(self, device: torch.device, copies: HostCopies | None) -> None:
        self.device, self.copies = device, copies
        self.halves: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, S, P, 2 * C]."""
        batch, frames, tokens, width = self.halves[0].shape
        return batch, frames, tokens, 2 * width

    def add(self, x: Tensor, *, changes: bool) -> None:
        """Add the output of a block.

        Args:
            x: The output.
            changes: Whether later blocks change the tensor.
        """
        if self.copies is not None:
            x = self.copies.copy(x)
        elif changes:
            x = x.clone()
        self.halves.append(x)

    def frames(self, part: slice) -> Tensor:  # [B, n, P, 2 * C]
        """Some of the frames, on the device."""
        return self._beside([half[:, part] for half in self.halves])

    def first_tokens(self) -> Tensor:  # [B, S, 1, 2 * C]
        """The first token of every frame, on the device."""
        return self._beside([half[:, :, :1] for half in self.halves])

    def _beside(self, halves: Sequence[Tensor]) -> Tensor:
        return torch.cat([half.to(self.device, non_blocking=True) for half in halves], dim=-1)


def frames_of(feature: Tensor | KeptLayer, part: slice) -> Tensor:  # [B, n, P, 2 * C]
    """A slice of frames of a feature that a head reads."""
    return feature[:, part] if isinstance(feature, Tensor) else feature.frames(part)


def first_tokens_of(feature: Tensor | KeptLayer | None) -> Tensor | None:  # [B, S, P or 1, 2 * C]
    """The first tokens of every frame, and all others if they are on the device already."""
    return feature.first_tokens() if isinstance(feature, KeptLayer) else feature
