"""Strided keys: every query attends to the special tokens and to every n-th patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geoaccel.merging import (
    AttentionContext,
    AttentionMerging,
    Effect,
    MergingMixer,
    Restore,
    TokenLayout,
    UserError,
    Work,
    attend,
    dense_layout,
    register,
)


@register
@dataclass(frozen=True)
class Strided(AttentionMerging):
    """Leaves out keys and values of global attention, and keeps all queries.

    Attributes:
        stride: Every n-th patch of a frame is a key, in raster order.
    """

    name: ClassVar[str] = "strided"
    stride: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UserError(f"strided: stride={self.stride}; give 1, which leaves out nothing, or more")

    def mixer(self, kernel: str) -> StridedMixer:
        return StridedMixer(self, kernel)

    def keys(self, layout: TokenLayout, device: torch.device) -> Tensor:  # [M]
        """Places of the keys among the tokens of a scene."""
        in_frame = torch.arange(layout.tokens_per_frame, device=device) - layout.num_special
        kept = (in_frame < 0) | (in_frame % self.stride == 0)
        return kept.repeat(layout.frames).nonzero()[:, 0]


class StridedMixer(MergingMixer):
    method: Strided

    def __call__(
        self,
        q: Tensor,  # [B, A, N, D]
        k: Tensor,  # [B, A, N, D]
        v: Tensor,  # [B, A, N, D]
        x: Tensor,  # [B, N, C]
        context: AttentionContext,
    ) -> tuple[Tensor, Restore | None]:
        layout = dense_layout(self.method, q, context)
        keys = self.method.keys(layout, q.device)
        tokens, gain = q.shape[2], None
        why = "one frame" if layout.frames == 1 else "stride 1" if self.method.stride == 1 else None
        if why is None:
            gain = self.gain(Work(tokens, tokens, len(keys)), layout, q)
            why = self.method.too_little(gain)
        if why is not None:
            return self.dense(q, k, v, x, context, why, gain)
        self.effect = Effect(tokens, tokens, len(keys), gain=gain)
        return attend(q, k[:, :, keys], v[:, :, keys], kernel=self.kernel), None
