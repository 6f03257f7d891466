"""Layers that see one or two frames: choices for single layers of global attention, by :mod:`geoaccel.merging.layers`.

Neither is a method on its own: with one of them in every layer, frames would see no other frame, or only the first, and
cameras would be guesses. In some layers they cost little accuracy; which ones depends on the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, FrameOnly, Held, Restore, Tokens
from geoaccel.attention_kernels import attend
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.gain import Extra, Work
from geoaccel.merging.method import AttentionMerging, Effect, MergingMixer

OPERATIONS = 10
"""Additional small operations per attention compared with dense, approximately."""


@dataclass(frozen=True, kw_only=True)
class FrameLayer(AttentionMerging):
    """Every query attends only to its own frame: :class:`geoaccel.attention.FrameOnly` as a choice for a layer.

    Attributes:
        bypass: As for every method, but off: an explicit choice for a layer is always applied.
    """

    name: ClassVar[str] = "frame-only"
    takes_packed: ClassVar[bool] = True
    bypass: bool = False

    def mixer(self, kernel: str) -> FrameMixer:
        return FrameMixer(self, kernel)


@dataclass(frozen=True, kw_only=True)
class FirstFrameLayer(AttentionMerging):
    """Every query attends to the first frame and its own.

    In the released code of SAF3R (ECCV 2026) some heads attend only to the first frame, as with ``own=False``; its
    layers also have other kinds of heads.

    Attributes:
        own: Whether a query also attends to its own frame.
        bypass: As for every method, but off: an explicit choice for a layer is always applied.
    """

    name: ClassVar[str] = "first-frame"
    takes_packed: ClassVar[bool] = True
    own: bool = True
    bypass: bool = False

    def mixer(self, kernel: str) -> FrameMixer:
        return FrameMixer(self, kernel)


class FrameMixer(MergingMixer):
    """Attends frame by frame, with or without the first frame; bit for bit dense for a single frame."""

    reads_tokens = False
    method: FrameLayer | FirstFrameLayer

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout, packing = context.layout, context.packing
        assert layout is not None, "the stream gives every global attention its layout"
        if layout.frames == 1:
            return self.dense(q, k, v, x, context, "one frame")
        work = self.work(layout, q)
        gain = self.gain(work, layout, q)
        why = self.method.too_little(gain)
        if why is not None:
            return self.dense(q, k, v, x, context, why, gain)
        if packing is None:
            mixed, keys = self._dense_tokens(q, k, v, x, context, layout), work.keys
        else:
            mixed, keys = self._packed_rows(q, k, v, layout, packing)
        self.effect = Effect(q.shape[2], q.shape[2], keys, gain=gain)
        return mixed, None

    def held(self, tokens: Tokens) -> Held:
        if isinstance(self.method, FrameLayer) or not self.method.own:
            return FrameOnly(self.kernel).held(tokens)
        # The first frame's keys and values precede those of every other frame.
        return Held(7 * tokens.bytes, tokens.bytes, keys=2 / tokens.layout.frames)

    def work(self, layout: TokenLayout, q: Tensor) -> Work:  # q [n, A, N, D]
        """Work of one attention; depends only on the shape of the queries."""
        tokens = q.shape[2] * len(q) / layout.batch  # of one scene; of packed ones on average
        keys = tokens / layout.frames * self._frames_seen(layout.frames)
        gathered = 2 * keys * q.shape[1] * q.shape[3] * layout.frames
        return Work(tokens, tokens, keys, Extra(read=gathered, operations=OPERATIONS))

    def _frames_seen(self, frames: int) -> float:
        """Average number of frames that a query attends to; for the first frame, `own` is the first frame itself."""
        both = isinstance(self.method, FirstFrameLayer) and self.method.own
        return 2 - 1 / frames if both else 1.0

    def _dense_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext, layout: TokenLayout
    ) -> Tensor:
        method, per_frame = self.method, layout.tokens_per_frame
        if isinstance(method, FrameLayer):
            return FrameOnly(self.kernel)(q, k, v, x, context)[0]
        if not method.own:
            return attend(q, k[:, :, :per_frame], v[:, :, :per_frame], kernel=self.kernel)
        frames = (layout.frames, per_frame)
        asked, keys, values = (t.unflatten(2, frames).transpose(1, 2) for t in (q, k, v))  # [n, S, A, P, D]
        alone = attend(asked[:, 0], keys[:, 0], values[:, 0], kernel=self.kernel)
        # All other frames at once: each attends to the first frame's keys and then its own.
        keys, values = (torch.cat([t[:, :1].expand_as(t[:, 1:]), t[:, 1:]], dim=3) for t in (keys, values))
        rest = attend(*(t.flatten(0, 1) for t in (asked[:, 1:], keys, values)), kernel=self.kernel)
        rest = rest.unflatten(0, (len(q), layout.frames - 1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([alone, rest], dim=2)

    def _packed_rows(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, packing: Packing
    ) -> tuple[Tensor, float]:
        """The same for packed rows, and the average number of keys per query."""
        if isinstance(self.method, FrameLayer):
            lengths = packing.frame_lengths
            mixed = attend(q, k, v, lengths=lengths, key_bias=packing.log_weight, kernel=self.kernel)
            return mixed, sum(length**2 for length in lengths) / sum(lengths)
        parts, seen, start, first = [], 0, 0, slice(0)
        for frame, length in enumerate(packing.frame_lengths):
            own = slice(start, start + length)
            first = own if frame % layout.frames == 0 else first
            shown = [first] if own == first or not self.method.own else [first, own]
            keys, values = (torch.cat([t[:, :, part] for part in shown], dim=2) for t in (k, v))
            weight = packing.log_weight
            bias = None if weight is None else torch.cat([weight[part] for part in shown])
            parts.append(attend(q[:, :, own], keys, values, key_bias=bias, kernel=self.kernel))
            seen += length * keys.shape[2]
            start += length
        return torch.cat(parts, dim=2), seen / start
