"""Where the tokens of one forward stand: dense, frame by frame, or packed into fewer.

A backbone's tokens form ``[B, S, P, C]``: P tokens a frame, special tokens (camera, registers) first, then the patches
row by row. A method that merges tokens of the residual stream packs them into ``[T, C]`` with T < B * S * P; the
blocks then run on the packed rows, and :meth:`Packing.unpack` spreads them out again where a head reads.

Everything here is made per call and holds no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AttentionKind = Literal["encoder", "frame", "global", "head"]


@dataclass(frozen=True)
class TokenLayout:
    """Counts of a dense token sequence.

    Attributes:
        batch: B scenes.
        frames: S photographs a scene.
        grid: (h, w) patches of a photograph.
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


@dataclass(frozen=True)
class Packing:
    """Which packed row stands for each dense token.

    Rows are grouped by frame and frames by scene, so every frame and every scene is one contiguous segment.

    Attributes:
        owner: [B, S, P], the row that stands for each dense token.
        frame_lengths: Rows of each frame, B * S numbers.
        positions: [T, 2], integer (y, x) of each row for rotary embeddings.
        weight: [T], how many dense tokens each row stands for.
    """

    owner: Tensor
    frame_lengths: tuple[int, ...]
    positions: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        batch, frames, _ = self.owner.shape
        if len(self.frame_lengths) != batch * frames or sum(self.frame_lengths) != len(self.positions):
            raise ValueError(
                f"a packing of {batch} x {frames} frames needs {batch * frames} frame lengths that sum to its "
                f"{len(self.positions)} rows, got {len(self.frame_lengths)} that sum to {sum(self.frame_lengths)}"
            )

    @property
    def scene_lengths(self) -> tuple[int, ...]:
        batch, frames, _ = self.owner.shape
        return tuple(sum(self.frame_lengths[b * frames : (b + 1) * frames]) for b in range(batch))

    def lengths(self, kind: AttentionKind) -> tuple[int, ...]:
        """Segment lengths of a frame or a global attention."""
        return self.scene_lengths if kind == "global" else self.frame_lengths

    def unpack(
        self,
        x: Tensor,  # [T, C]
    ) -> Tensor:  # [B, S, P, C]
        """Copy every row to the dense tokens it stands for."""
        return x[self.owner]

    @classmethod
    def identity(cls, layout: TokenLayout, device: torch.device | str | None = None) -> Packing:
        """Every token stands for itself."""
        shape = (layout.batch, layout.frames, layout.tokens_per_frame)
        rows = layout.batch * layout.tokens_per_scene
        return cls(
            owner=torch.arange(rows, device=device).reshape(shape),
            frame_lengths=(layout.tokens_per_frame,) * (layout.batch * layout.frames),
            positions=layout.positions(device).repeat(layout.batch * layout.frames, 1),
            weight=torch.ones(rows, device=device),
        )
