"""Where the published code of FastVGGT and LiteVGGT differs from the papers, for weights trained with it.

``FastVGGT(released_code=True)`` and ``LiteVGGT(released_code=True)`` choose exactly the same tokens as the authors'
code, which differs from the papers, and from the methods' defaults here, in these points:

    - Cells. The pattern of 2 x 2 cells is cropped to an even grid and written row after row into a grid that may be
      wider, which skews it where the width is odd (:func:`skewed_cells`).
    - LiteVGGT's target of a 2 x 2 cell is chosen by the lowest of four consecutive patches in a row, which is as good
      as random (:func:`lowest_of_runs`).
    - A protected token that is also a target is attended to twice (:class:`ReleasedPartition`).
    - Sources are compared in bfloat16, whatever the dtype of the tokens (:func:`bfloat16_match`).
    - FastVGGT's distance between protected tokens is rounded down (:func:`whole_steps`).
    - LiteVGGT recomputes matching at layers 0, 6, 15 and 20, not at every sixth.
    - A batch uses the matching of its first scene; here only one scene at a time is allowed.

HTTM's code is not published; Co-Me's does not differ from its paper in anything that trained weights depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from geoaccel.errors import UserError
from geoaccel.layout import TokenLayout
from geoaccel.merging.partition import CELL, Partition, group_numbers, marked, scene_mask, take
from geoaccel.plan import MergePlan

LITEVGGT_REFRESH = (0, 6, 15, 20)
"""Layers, out of 24, at which LiteVGGT's code recomputes matching."""

CHUNK = 5000
"""Sources that the published code compares at a time."""


@dataclass(frozen=True, eq=False)
class ReleasedPlan(MergePlan):
    """A merge plan of one scene's N tokens in which some of them appear twice.

    ``group_of`` covers the N tokens, then the repeated ones, each its own group.

    Attributes:
        repeated: [1, n_r], the tokens that appear twice.
    """

    repeated: Tensor

    def merge(
        self,
        x: Tensor,  # [1, N, C]
        weight: Tensor | None = None,
    ) -> Tensor:  # [1, M, C]
        """Mean of every group."""
        assert weight is None, "the published code counts every token once"
        return super().merge(torch.cat([x, take(x, self.repeated)], dim=1))

    def unmerge(
        self,
        y: Tensor,  # [1, M, C]
    ) -> Tensor:  # [1, N, C]
        """Copy every group's row to its tokens; a repeated token reads its own row."""
        dense = super().unmerge(y)
        kept = dense.shape[1] - self.repeated.shape[-1]
        index = self.repeated[..., None].expand(-1, -1, y.shape[-1])
        return dense[:, :kept].scatter(1, index, dense[:, kept:])


@dataclass(frozen=True, eq=False)
class ReleasedPartition(Partition):
    """A partition whose protected targets appear twice: as targets, and alone.

    Attributes:
        repeated: [1, n_r].
    """

    repeated: Tensor

    @classmethod
    def from_masks(
        cls,
        target: Tensor,  # [1, N], bool
        protected: Tensor,  # [1, N], bool
    ) -> ReleasedPartition:
        """A partition from masks; tokens in both masks are targets, and repeated."""
        # The published code breaks ties between targets by the order of an unstable sort.
        targets = (~target).to(torch.uint8).argsort(dim=-1)[:, : int(target[0].sum())]
        alone, sources = marked(protected & ~target), marked(~(target | protected))
        return cls(targets, alone, sources, marked(target & protected))

    def assign(
        self,
        x: Tensor,  # [1, N, C]
        most: int,
    ) -> MergePlan:
        """Assign every source to its most similar target, at most `most` of them."""
        owner, merged = self.owners(x, most, bfloat16_match)
        tokens, repeats = x.shape[1], self.repeated.shape[-1]
        again = torch.arange(tokens, tokens + repeats, device=x.device).expand(len(owner), -1)
        owner = torch.cat([owner, again], dim=-1)
        return ReleasedPlan(group_numbers(owner), tokens + repeats - merged, self.repeated)


def fastvggt_partition(layout: TokenLayout, protect: float, seed: int) -> ReleasedPartition:
    """FastVGGT's roles of the tokens: a random patch of each cell, and a stride over the whole scene.

    Raises:
        ValueError: For more than one scene.
    """
    _check_one_scene("fastvggt", layout)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device chooses the same
    height, width = layout.grid
    shape = (layout.frames - 1, height // CELL, width // CELL)
    patches = skewed_cells(torch.randint(CELL * CELL, shape, generator=generator, device="cpu"), layout.grid)
    patches = torch.cat([patches[:1], patches])  # all tokens of the first frame are targets anyway
    targets = scene_mask(patches[None], layout, special=True, anchor=True)
    return ReleasedPartition.from_masks(targets, whole_steps(layout.tokens_per_scene, protect))


def litevggt_partition(
    score: Tensor,  # [1, S, h, w]
    layout: TokenLayout,
    protect: float,
) -> ReleasedPartition:
    """LiteVGGT's roles of the tokens by their importance, which its code rounds to bfloat16.

    Raises:
        ValueError: For more than one scene.
    """
    _check_one_scene("litevggt", layout)
    score = score.bfloat16()
    targets = skewed_cells(lowest_of_runs(score), layout.grid)
    count = max(int(protect > 0), int(protect * layout.num_patches))
    top = score.flatten(-2).topk(count, dim=-1).indices
    protected = torch.zeros_like(targets).scatter(-1, top, True)
    return ReleasedPartition.from_masks(
        scene_mask(targets, layout, special=True, anchor=True), scene_mask(protected, layout, special=False)
    )


def skewed_cells(
    choice: Tensor,  # [.., h // 2, w // 2], which of four
    grid: tuple[int, int],
) -> Tensor:  # [.., h * w], bool
    """Mark one patch of each cell: the pattern of an even grid, laid over the first patches whatever the width."""
    chosen = one_hot(choice, CELL * CELL).bool().unflatten(-1, (CELL, CELL)).transpose(-3, -2)
    pattern = chosen.flatten(-4)
    rest = pattern.new_zeros(*pattern.shape[:-1], grid[0] * grid[1] - pattern.shape[-1])
    return torch.cat([pattern, rest], dim=-1)


def lowest_of_runs(
    score: Tensor,  # [.., h, w]
) -> Tensor:  # [.., h // 2, w // 2]
    """Index of the lowest of four consecutive patches in a row, for each cell."""
    rows, columns = score.shape[-2] // CELL, score.shape[-1] // CELL
    runs = score[..., : rows * CELL, : columns * CELL].flatten(-2).unflatten(-1, (rows, columns, CELL * CELL))
    return runs.argmin(-1)


def whole_steps(tokens: int, share: float) -> Tensor:  # [1, N], bool
    """Mark a fraction of the tokens at an integer distance; unless it is 1 / n, the last frames are left out."""
    mask = torch.zeros(1, tokens, dtype=torch.bool, device="cpu")
    count = int(share * tokens)
    if count:
        mask[:, torch.arange(count, device="cpu") * (tokens // count)] = True
    return mask


def bfloat16_match(
    source: Tensor,  # [B, n, C]
    target: Tensor,  # [B, m, C]
) -> tuple[Tensor, Tensor]:  # [B, n] float32, [B, n] int64
    """Cosine matching in bfloat16, whatever the dtype of the tokens."""
    source, target = ((t / t.norm(dim=-1, keepdim=True)).bfloat16() for t in (source, target))
    parts = [(part @ target.transpose(-1, -2)).max(-1) for part in source.split(CHUNK, dim=-2)]
    return torch.cat([p.values.float() for p in parts], dim=-1), torch.cat([p.indices for p in parts], dim=-1)


def _check_one_scene(name: str, layout: TokenLayout) -> None:
    if layout.batch > 1:
        raise UserError(
            f"{name}: released_code=True supports one scene, got a batch of {layout.batch}; "
            "call the model for each scene separately"
        )
