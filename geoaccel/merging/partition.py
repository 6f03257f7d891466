"""Which tokens may absorb others, which stay alone, and who finds a partner: FastVGGT and LiteVGGT before matching.

A scene's N = S * P tokens stand frame by frame, special tokens first in each. Targets absorb, protected tokens stay
alone, sources look for the most similar target. Everything here is a pure function of shapes, seeds and scores, on any
grid and for any number of frames.

The published code chooses otherwise on three counts, and the functions whose names begin with ``released`` reproduce
that for weights that were trained with it: the pattern of cells is cropped to an even grid and written row after row
into a grid that may be wider; a cell's choice comes from four neighbours in a row and is applied to a cell of two by
two; and a protected token that is a target as well appears twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.layout import TokenLayout
from geoaccel.plan import MergePlan
from geoaccel.similarity import best_match

Matcher = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CELL = 2
"""Side of a cell in patches; edge cells of an odd grid are smaller."""

RELEASED_CHUNK = 5000
"""Sources that the published code compares at a time."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The part that every token of a scene plays; rows (scenes) may differ.

    Attributes:
        targets: [R, n_t], int64. R is B, or 1 where all scenes are alike.
        protected: [R, n_p], alone in their groups.
        sources: [R, n_s].
        repeated: [R, n_r], targets that the released code also protects: they absorb, and appear once more alone.
    """

    targets: Tensor
    protected: Tensor
    sources: Tensor
    repeated: Tensor

    @classmethod
    def from_masks(
        cls,
        target: Tensor,  # [R, N], bool
        protected: Tensor,  # [R, N], bool
        *,
        repeat: bool = False,
    ) -> Partition:
        """A partition from masks of which every row holds equally many.

        Args:
            target: Who absorbs.
            protected: Who stays alone. Tokens that are marked twice are targets.
            repeat: Note those tokens as ``repeated``, as the released code has them.
        """
        targets = marked(target)
        if repeat:
            # The published code breaks ties between targets by the order that an unstable sort leaves.
            targets = (~target).to(torch.uint8).argsort(dim=-1)[:, : targets.shape[-1]]
        both = marked(target & protected & repeat)
        return cls(targets, marked(protected & ~target), marked(~(target | protected)), both)

    def expand(self, batch: int) -> Partition:
        """The same for every scene of a batch."""
        return self._each(lambda part: part.expand(batch, -1))

    def to(self, device: torch.device) -> Partition:
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Partition:
        return Partition(*(change(part) for part in (self.targets, self.protected, self.sources, self.repeated)))


@dataclass(frozen=True, eq=False)
class Assignment:
    """A merge plan of one scene's tokens, in which the released code's repeated tokens appear twice.

    Attributes:
        plan: Of the N tokens, then the repeated ones once more, each alone.
        repeated: [B, n_r]; empty everywhere but with ``released_code``.
    """

    plan: MergePlan
    repeated: Tensor

    @property
    def length(self) -> int:
        """M."""
        return self.plan.num_groups

    def merge(
        self,
        x: Tensor,  # [B, N, C]
    ) -> Tensor:  # [B, M, C]
        """Mean of every group."""
        if self.repeated.shape[-1]:
            x = torch.cat([x, take(x, self.repeated)], dim=1)
        return self.plan.merge(x)

    def unmerge(
        self,
        y: Tensor,  # [B, M, C]
    ) -> Tensor:  # [B, N, C]
        """Copy every group's row to its tokens; a repeated token reads the row where it is alone."""
        dense = self.plan.unmerge(y)
        repeats = self.repeated.shape[-1]
        if not repeats:
            return dense
        index = self.repeated[..., None].expand(-1, -1, y.shape[-1])
        return dense[:, :-repeats].scatter(1, index, dense[:, -repeats:])


def assign(
    partition: Partition,
    x: Tensor,  # [B, N, C]
    most: int,
    *,
    match: Matcher = best_match,
) -> Assignment:
    """Give every source to the target that is most like it.

    Args:
        partition: With B rows.
        x: What is compared, by cosine.
        most: Sources that may be merged; where there are more, those least like their target stay alone.
        match: Gives each source the score and the index of its best target.
    """
    batch, tokens, _ = x.shape
    sources, targets = partition.sources, partition.targets
    score, best = match(take(x, sources), take(x, targets))
    if most < sources.shape[-1]:
        first = score.argsort(dim=-1, descending=True, stable=True)[:, :most]
        sources, best = sources.gather(-1, first), best.gather(-1, first)
    owner = torch.arange(tokens, device=x.device).repeat(batch, 1)
    owner = owner.scatter(-1, sources, targets.gather(-1, best))
    repeats = partition.repeated.shape[-1]
    if repeats:
        owner = torch.cat([owner, torch.arange(tokens, tokens + repeats, device=x.device).expand(batch, -1)], dim=-1)
    own = owner == torch.arange(owner.shape[-1], device=x.device)
    group_of = (own.cumsum(-1) - 1).gather(-1, owner)
    return Assignment(MergePlan(group_of, owner.shape[-1] - sources.shape[-1]), partition.repeated)


def released_match(
    source: Tensor,  # [B, n, C]
    target: Tensor,  # [B, m, C]
) -> tuple[Tensor, Tensor]:  # [B, n] float32, [B, n] int64
    """Cosine matching as the published code has it: in bfloat16, whatever the tokens are."""
    source, target = ((t / t.norm(dim=-1, keepdim=True)).bfloat16() for t in (source, target))
    parts = [(part @ target.transpose(-1, -2)).max(-1) for part in source.split(RELEASED_CHUNK, dim=-2)]
    return torch.cat([p.values.float() for p in parts], dim=-1), torch.cat([p.indices for p in parts], dim=-1)


def marked(
    mask: Tensor,  # [R, N], bool, equally many in each row
) -> Tensor:  # [R, n], int64
    """Indices of the marked tokens of each row, ascending."""
    return mask.nonzero()[:, 1].view(mask.shape[0], -1)


def take(
    x: Tensor,  # [B, N, C]
    index: Tensor,  # [B, n]
) -> Tensor:  # [B, n, C]
    """Rows of every scene; a flat selection of rows is several times faster than a gather of elements."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[-1]).index_select(0, (index + start).flatten()).view(*index.shape, x.shape[-1])


def num_cells(grid: tuple[int, int]) -> int:
    """Cells of a grid of (h, w) patches, smaller ones at the edges of an odd grid included."""
    return -(-grid[0] // CELL) * -(-grid[1] // CELL)


def lowest_of_cells(
    score: Tensor,  # [.., h, w]
) -> Tensor:  # [.., h * w], bool
    """Mark the lowest-score patch of every cell; of equal ones the first."""
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
    """Mark a patch of every cell at random; the same on every device, whatever the batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.frames, *layout.grid)
    return lowest_of_cells(torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu"))


def highest(
    score: Tensor,  # [.., n]
    count: int,
) -> Tensor:  # [.., n], bool
    """Mark the ``count`` highest; of equal ones the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def released_cells(
    choice: Tensor,  # [.., h // 2, w // 2], which of four
    grid: tuple[int, int],
) -> Tensor:  # [.., h * w], bool
    """The published code's targets: the pattern of an even grid, laid over the first patches whatever the width."""
    chosen = torch.nn.functional.one_hot(choice, CELL * CELL).bool().unflatten(-1, (CELL, CELL)).transpose(-3, -2)
    pattern = chosen.flatten(-4)
    rest = pattern.new_zeros(*pattern.shape[:-1], grid[0] * grid[1] - pattern.shape[-1])
    return torch.cat([pattern, rest], dim=-1)


def released_lowest(
    score: Tensor,  # [.., h, w]
) -> Tensor:  # [.., h // 2, w // 2]
    """The published code's choice for each cell: the lowest of four patches that follow each other in a row."""
    rows, columns = score.shape[-2] // CELL, score.shape[-1] // CELL
    runs = score[..., : rows * CELL, : columns * CELL].flatten(-2).unflatten(-1, (rows, columns, CELL * CELL))
    return runs.argmin(-1)


def scene_mask(
    patches: Tensor,  # [R, S, h * w], bool
    layout: TokenLayout,
    *,
    special: bool,
    anchor: bool | None = None,
) -> Tensor:  # [R, N], bool
    """A mask of whole scenes from one of their patches.

    Args:
        patches: Of every frame.
        layout: Where the tokens stand.
        special: What it says of special tokens.
        anchor: What it says of the first frame's tokens; None: the same as of the others.
    """
    head = patches.new_full((*patches.shape[:2], layout.num_special), special)
    mask = torch.cat([head, patches], dim=-1)
    if anchor is not None:
        mask[:, 0] = anchor
    return mask.flatten(1)
