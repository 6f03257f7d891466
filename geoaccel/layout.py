"""Layout of the tokens of one forward: dense, frame by frame, or packed into fewer.

A backbone's tokens form ``[B, S, P, C]``: P tokens per frame, special tokens (camera, registers) first, then the
patches row by row. A method that merges tokens of the residual stream packs them into ``[T, C]`` with T < B * S * P
(:meth:`Packing.pack`); the blocks then run on the packed rows, and :meth:`Packing.unpack` restores the full length
for the heads.

Everything here is made per call and holds no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from geoaccel.plan import MergePlan

AttentionKind = Literal["encoder", "frame", "global", "head"]


@dataclass(frozen=True)
class TokenLayout:
    """Counts of a dense token sequence.

    Attributes:
        batch: B scenes.
        frames: S images per scene.
        grid: (h, w) patches per image.
        num_special: Special tokens at the start of each frame.
    """

    batch: int
    frames: int
    grid: tuple[int, int]
    num_special: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_frame(self) -> int:
        """P, special tokens included."""
        return self.num_special + self.num_patches

    @property
    def tokens_per_scene(self) -> int:
        """N of a global attention: S * P."""
        return self.frames * self.tokens_per_frame

    def positions(self, device: torch.device | str | None = None) -> Tensor:  # [P, 2]
        """Integer (y, x) of every token of a frame: patches count from 1, special tokens stand at (0, 0)."""
        rows = torch.arange(1, self.grid[0] + 1, device=device)
        columns = torch.arange(1, self.grid[1] + 1, device=device)
        patches = torch.cartesian_prod(rows, columns)
        return torch.cat([patches.new_zeros(self.num_special, 2), patches])


@dataclass(frozen=True, eq=False)
class Packing:
    """Packing of tokens: the packed row that represents each dense token.

    Rows are grouped by frame and frames by scene, so every frame and every scene is one contiguous segment. Special
    tokens are never merged, and come first among the rows of their frame.

    Attributes:
        owner: [B, S, P], the row that represents each dense token.
        frame_lengths: Rows of each frame, B * S numbers.
        positions: [T, 2], (y, x) of each row for rotary embeddings: the mean position of its tokens.
        weight: [T], number of dense tokens in each row.
        weigh_keys: Whether attention counts a row as that many keys (proportional attention).
    """

    owner: Tensor
    frame_lengths: tuple[int, ...]
    positions: Tensor
    weight: Tensor
    weigh_keys: bool = True

    def __post_init__(self) -> None:
        batch, frames, _ = self.owner.shape
        if len(self.frame_lengths) != batch * frames or sum(self.frame_lengths) != len(self.positions):
            raise ValueError(
                f"a packing of {batch} x {frames} frames needs {batch * frames} frame lengths that sum to its "
                f"{len(self.positions)} rows, got {len(self.frame_lengths)} that sum to {sum(self.frame_lengths)}"
            )

    @classmethod
    def from_owner(
        cls,
        owner: Tensor,  # [B, S, P], int64
        layout: TokenLayout,
        *,
        weigh_keys: bool = True,
    ) -> Packing:
        """Count the tokens of each row, and place it at their exact mean position, which may lie between patches.

        Sums of positions are integers: means in a narrow dtype are off by a patch on grids wider than 28.
        """
        edges = owner.amax(-1).flatten().tolist()  # frames follow one another, so each ends with its largest row
        plan = MergePlan(owner.flatten(), edges[-1] + 1)
        positions = layout.positions(owner.device).repeat(layout.batch * layout.frames, 1)
        total = positions.new_zeros(plan.num_groups, 2).index_add_(0, plan.group_of, positions)
        lengths = tuple(stop - start for start, stop in zip([-1, *edges[:-1]], edges, strict=True))
        return cls(owner, lengths, total / plan.counts[:, None], plan.counts.float(), weigh_keys)

    @classmethod
    def identity(cls, layout: TokenLayout, device: torch.device | str | None = None) -> Packing:
        """Every token is its own row."""
        shape = (layout.batch, layout.frames, layout.tokens_per_frame)
        rows = torch.arange(layout.batch * layout.tokens_per_scene, device=device)
        return cls.from_owner(rows.reshape(shape), layout)

    @property
    def scene_lengths(self) -> tuple[int, ...]:
        batch, frames, _ = self.owner.shape
        return tuple(sum(self.frame_lengths[b * frames : (b + 1) * frames]) for b in range(batch))

    def lengths(self, kind: AttentionKind) -> tuple[int, ...]:
        """Segment lengths of an attention within frames or over whole scenes."""
        return self.scene_lengths if kind == "global" else self.frame_lengths

    @cached_property
    def log_weight(self) -> Tensor | None:  # [T]
        """Bias on the logits of each key; None where keys are not weighed."""
        return self.weight.log() if self.weigh_keys else None

    def pack(
        self,
        x: Tensor,  # [B, S, P, C]
    ) -> Tensor:  # [T, C]
        """Mean of the tokens of each row."""
        return self._plan.merge(x.flatten(0, 2))

    def unpack(
        self,
        x: Tensor,  # [T, C]
    ) -> Tensor:  # [B, S, P, C]
        """Copy every row to its dense tokens."""
        return x[self.owner]

    def with_special(self, now: int, wanted: int) -> Packing:
        """The same packing of patches, after a different number of special tokens.

        Args:
            now: Special tokens of each frame so far.
            wanted: Special tokens of each frame afterwards.
        """
        batch, frames, _ = self.owner.shape
        lengths = torch.tensor(self.frame_lengths, device=self.owner.device)
        change = wanted - now
        start = (lengths.cumsum(0) - lengths).view(batch, frames, 1)  # first row of each frame
        frame = torch.arange(batch * frames, device=self.owner.device).view(batch, frames, 1)
        special = start + frame * change + torch.arange(wanted, device=self.owner.device)
        owner = torch.cat([special, self.owner[..., now:] + (frame + 1) * change], dim=-1)

        def replaced(rows: Tensor, value: int) -> Tensor:
            fresh = rows.new_full((wanted, *rows.shape[1:]), value)
            return torch.cat([part for rest in rows.split(self.frame_lengths) for part in (fresh, rest[now:])])

        frame_lengths = tuple(length + change for length in self.frame_lengths)
        positions, weight = replaced(self.positions, 0), replaced(self.weight, 1)
        return Packing(owner, frame_lengths, positions, weight, self.weigh_keys)

    @cached_property
    def _plan(self) -> MergePlan:
        return MergePlan(self.owner.flatten(), len(self.weight))
