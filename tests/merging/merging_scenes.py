"""Photographs, tokens and groups for the tests of merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.layout import TokenLayout
from geoaccel.merging.groups import num_groups

THREE = (3, 3)


def photographs(frames: int, grid: tuple[int, int], *, batch: int = 1, seed: int = 0) -> Tensor:  # [B, S, 3, H, W]
    """Noise over a coarse pattern, so that patches differ."""
    generator = torch.Generator().manual_seed(seed)
    size = (14 * grid[0], 14 * grid[1])
    coarse = torch.rand(batch * frames, 3, grid[0], grid[1], generator=generator)
    images = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)).unflatten(0, (batch, frames))


class Scene:
    """Random tokens for one global attention, and what the backbone leaves for methods."""

    heads, head_dim = 2, 8

    def __init__(self, frames: int, grid: tuple[int, int], batch: int = 1, num_special: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout = TokenLayout(batch, frames, grid, num_special)
        shape = (batch, self.layout.tokens_per_scene, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        # Special tokens are as good as equal to each other and to their first patch: matching would love to merge them.
        frame = (batch, frames, self.layout.tokens_per_frame)
        self.x = torch.randn(*frame, self.heads * self.head_dim, generator=generator)
        self.x[:, :, : num_special + 1] = self.x[:, :1, :1]
        self.x = self.x.flatten(1, 2)
        q, k = (t.unflatten(1, frame[1:]) for t in (q, k))
        for t in (q, k):
            t[:, :, : num_special + 1] = t[:, :1, :1]
            t += 1e-3 * torch.randn(t.shape, generator=generator)
        q, k = (t.flatten(1, 2) for t in (q, k))
        self.q, self.k, self.v = (t.transpose(1, 2) for t in (q, k, v))
        self.state = ForwardState(
            images=photographs(frames, grid, batch=batch, seed=seed),
            patches=torch.randn(batch, frames, grid[0] * grid[1], 16, generator=generator),
        )

    @property
    def special(self) -> Tensor:  # [N], bool
        in_frame = torch.arange(self.layout.tokens_per_frame) < self.layout.num_special
        return in_frame.repeat(self.layout.frames)

    def through(self, mixer: Any, index: int = 0) -> Tensor:  # [B, A, N, D]
        """What the attention module would make of it, with an output projection that changes nothing."""
        context = AttentionContext("global", index, self.layout, state=self.state)
        mixer.prepare(self.heads, self.head_dim, self.x.device, context)
        mixed, restore = mixer(self.q, self.k, self.v, self.x, context)
        out = mixed.transpose(1, 2).flatten(2)
        out = out if restore is None else restore(out)
        return out.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def groups_of(out: Tensor) -> list[Tensor]:  # out [N, D]
    """Tokens that share one answer."""
    _, number = out.unique(dim=0, return_inverse=True)
    return [(number == group).nonzero()[:, 0] for group in number.unique()]


def layout_of(grid: tuple[int, int], *, batch: int = 2, frames: int = 3, special: int = 2) -> TokenLayout:
    return TokenLayout(batch, frames, grid, special)


def some_flags(layout: TokenLayout, group: tuple[int, int] = THREE, seed: int = 0) -> Tensor:
    shape = (layout.batch, layout.frames, *num_groups(layout.grid, group))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def tokens(layout: TokenLayout, width: int = 8, seed: int = 1) -> Tensor:
    shape = (layout.batch, layout.frames, layout.tokens_per_frame, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
