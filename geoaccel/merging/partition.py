"""Partition of tokens into targets, protected tokens and sources, for FastVGGT and LiteVGGT.

A scene's N = S * P tokens are ordered frame by frame, special tokens first. Each source merges into its most similar
target; protected tokens stay unmerged. Everything here is a pure function of shapes, seeds and scores, on any grid and
for any number of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from geoaccel.layout import TokenLayout
from geoaccel.plan import MergePlan
from geoaccel.similarity import best_match

Matcher = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gives each source [B, n, C] the score [B, n] and the index [B, n] of its best target [B, m, C]."""

CELL = 2
"""Side of a cell in patches; edge cells of an odd grid are smaller."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The role of every token of a scene; rows (scenes) may differ.

    Attributes:
        targets: [R, n_t], int64. R is B, or 1 if all scenes have the same partition.
        protected: [R, n_p], each its own group.
        sources: [R, n_s].
    """

    targets: Tensor
    protected: Tensor
    sources: Tensor

    @classmethod
    def from_masks(
        cls,
        target: Tensor,  # [R, N], bool
        protected: Tensor,  # [R, N], bool
    ) -> Partition:
        """A partition from masks with equally many tokens in each row.

        Args:
            target: Targets.
            protected: Protected tokens. Tokens in both masks are targets.
        """
        return cls(marked(target), marked(protected & ~target), marked(~(target | protected)))

    def expand(self, batch: int) -> Self:
        """The same for every scene of a batch."""
        return self._each(lambda part: part.expand(batch, -1))

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*(change(getattr(self, part.name)) for part in fields(self)))

    def assign(
        self,
        x: Tensor,  # [B, N, C]
        most: int,
    ) -> MergePlan:
        """Assign every source to its most similar target.

        Args:
            x: Features compared by cosine; as many rows as the partition has.
            most: Largest number of sources to merge; if there are more, those least similar to their target stay
                unmerged.
        """
        owner, merged = self.owners(x, most, best_match)
        return MergePlan(group_numbers(owner), owner.shape[-1] - merged)

    def owners(
        self,
        x: Tensor,  # [B, N, C]
        most: int,
        match: Matcher,
    ) -> tuple[Tensor, int]:  # [B, N]
        """The owner of each token, and how many sources of each scene were merged."""
        batch, tokens, _ = x.shape
        sources = self.sources
        score, best = match(take(x, sources), take(x, self.targets))
        if most < sources.shape[-1]:
            first = score.argsort(dim=-1, descending=True, stable=True)[:, :most]
            sources, best = sources.gather(-1, first), best.gather(-1, first)
        owner = torch.arange(tokens, device=x.device).repeat(batch, 1)
        return owner.scatter(-1, sources, self.targets.gather(-1, best)), sources.shape[-1]


def group_numbers(
    owner: Tensor,  # [B, N], the token that represents each token
) -> Tensor:  # [B, N]
    """Groups, numbered in the order of their owners."""
    own = owner == torch.arange(owner.shape[-1], device=owner.device)
    return (own.cumsum(-1) - 1).gather(-1, owner)


def marked(
    mask: Tensor,  # [R, N], bool, equally many in each row
) -> Tensor:  # [R, n], int64
    """Indices of the marked tokens of each row, ascending."""
    return mask.nonzero()[:, 1].view(mask.shape[0], -1)


def take(
    x: Tensor,  # [B, N, C]
    index: Tensor,  # [B, n]
) -> Tensor:  # [B, n, C]
    """Select rows of every scene; a flat selection of rows is several times faster than a gather of elements."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[-1]).index_select(0, (index + start).flatten()).view(*index.shape, x.shape[-1])


def num_cells(grid: tuple[int, int]) -> int:
    """Number of cells of a grid of (h, w) patches, including smaller ones at the edges of an odd grid."""
    return -(-grid[0] // CELL) * -(-grid[1] // CELL)


def lowest_of_cells(
    score: Tensor,  # [.., h, w]
) -> Tensor:  # [.., h * w], bool
    """Mark the lowest-score patch of every cell; ties go to the first."""
    height, width = score.shape[-2:]
    rows, columns = -(-height // CELL), -(-width // CELL)
    padded = score.new_full((*score.shape[:-2], rows * CELL, columns * CELL), torch.inf)
    padded[..., :height, :width] = score
    cells = padded.unflatten(-1, (columns, CELL)).unflatten(-3, (rows, CELL)).transpose(-3, -2)
    choice = cells.flatten(-2).argmin(-1, keepdim=True)  # [.., rows, columns, 1]
    chosen = torch.zeros(*choice.shape[:-1], CELL * CELL, dtype=torch.bool, device=score.device)
    chosen = chosen.scatter(-1, choice, True).unflatten(-1, (CELL, CELL)).transpose(-3, -2)
    return chosen.flatten(-4, -3).flatten(-2)[..., :height, :width].flatten(-2)


def random_of_cells(layout: TokenLayout, seed: int) -> Tensor:  # [S, h * w], bool
    """Mark a random patch of every cell; the same on every device, whatever the batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.frames, *layout.grid)
    return lowest_of_cells(torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu"))


def highest(
    score: Tensor,  # [.., n]
    count: int,
) -> Tensor:  # [.., n], bool
    """Mark the ``count`` highest; ties go to the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def scene_mask(
    patches: Tensor,  # [R, S, h * w], bool
    layout: TokenLayout,
    *,
    special: bool,
    anchor: bool | None = None,
) -> Tensor:  # [R, N], bool
    """A mask over all tokens of scenes, from one over their patches.

    Args:
        patches: Mask of the patches of every frame.
        layout: Layout of the tokens.
        special: Value for special tokens.
        anchor: Value for all tokens of the first frame; None: as for the others.
    """
    head = patches.new_full((*patches.shape[:2], layout.num_special), special)
    mask = torch.cat([head, patches], dim=-1)
    if anchor is not None:
        mask[:, 0] = anchor
    return mask.flatten(1)
