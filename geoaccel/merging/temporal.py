"""HTTM's temporal reordering: which tokens of a scene are compared with each other, and which of them absorb the rest.

The frames of a scene are cut into groups that follow one another, and the patches of a frame into runs in raster order;
a block is one run of patches over one group of frames. All sizes are near-equal, so that any number of frames and any
grid will do. It is one index for a whole forward: tokens are never moved, only looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.kept import kept
from geoaccel.layout import Packing, TokenLayout

# Powers of the inverse of the root of x^4 = x + 1: multiples of them fill three dimensions evenly.
LATTICE = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)


def num_blocks(layout: TokenLayout, run: int, frames: int) -> tuple[int, int]:
    """Runs of patches in a frame, and groups of frames in a scene.

    Args:
        layout: The dense layout.
        run: Patches of a frame that belong together; runs are as near to it as equal ones can be.
        frames: Most frames of a block.
    """
    return max(1, round(layout.num_patches / run)), -(-layout.frames // frames)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of one scene stand; T tokens, dense or packed.

    Attributes:
        frame: [T], int64, from 0.
        position: [T, 2], integer (y, x) as in :meth:`TokenLayout.positions`; special tokens stand at (0, 0).
        layout: The dense layout.
    """

    frame: Tensor
    position: Tensor
    layout: TokenLayout

    @classmethod
    def dense(cls, layout: TokenLayout, device: torch.device) -> Places:
        """The same for every scene of a batch."""
        frame = torch.arange(layout.frames, device=device).repeat_interleave(layout.tokens_per_frame)
        return cls(frame, layout.positions(device).repeat(layout.frames, 1), layout)

    @classmethod
    def packed(cls, packing: Packing, layout: TokenLayout) -> list[Places]:
        """One for every scene; a packed row stands where the middle of its tokens is."""
        device = packing.positions.device
        lengths = torch.tensor(packing.frame_lengths, device=device)
        frame = torch.arange(len(lengths), device=device)
        frame = frame.repeat_interleave(lengths, output_size=sum(packing.frame_lengths)) % layout.frames
        scenes = packing.scene_lengths
        return [cls(*parts, layout) for parts in zip(frame.split(scenes), packing.positions.split(scenes), strict=True)]

    @property
    def patch(self) -> Tensor:  # [T], bool
        """Which tokens are patches."""
        return self.position[:, 0] > 0

    def blocks(self, run: int, frames: int) -> Tensor:  # [T], int64
        """The block of every patch, with :func:`num_blocks` as they are; meaningless for special tokens."""
        runs, groups = num_blocks(self.layout, run, frames)
        raster = (self.position[:, 0] - 1) * self.layout.grid[1] + self.position[:, 1] - 1
        return (self.frame * groups // self.layout.frames) * runs + raster * runs // self.layout.num_patches


@dataclass(frozen=True, eq=False)
class Split:
    """Targets and sources of every block; the same for all heads.

    Blocks are rows of one length: the last token of a shorter row is repeated, which changes no match.

    Attributes:
        targets: [G, m], tokens that absorb.
        sources: [G, s], tokens that look for a target of their own block.
        columns: [n], where each of the n sources stands in the flattened ``sources``.
        number: [T], the group of every token that is no source; tokens keep their order.
        num_groups: Tokens that are no sources.
        free: Tokens that may be sources: patches that are no anchors.
    """

    targets: Tensor
    sources: Tensor
    columns: Tensor
    number: Tensor
    num_groups: int
    free: int

    @classmethod
    def of(cls, places: Places, block: tuple[int, int], share: float, *, anchor: bool = False) -> Split:
        """Mark an even share of the patches of each block as targets, at least one.

        Patches are ranked by the fractional part of a linear form of column, row and frame. The lowest are as good as
        evenly spread over the image, and other ones in every frame.

        Args:
            places: Of one scene.
            block: Patches of a frame, and frames, that are compared with each other.
            share: Of the patches.
            anchor: All patches of the first frame are targets on top of that.
        """
        patches = places.patch.nonzero()[:, 0]
        frame, position = places.frame[patches], places.position[patches].double()
        _, of, sizes = places.blocks(*block)[patches].unique(return_inverse=True, return_counts=True)
        rank = (position[:, 1] * LATTICE[0] + position[:, 0] * LATTICE[1] + frame * LATTICE[2]) % 1
        anchored = (frame == 0) & anchor
        # Blocks one after the other, within a block anchors first, then by rank.
        order = (2 * of + rank.masked_fill(anchored, -0.5)).argsort(stable=True)
        first = torch.zeros_like(sizes).index_add_(0, of, anchored.long())
        targets = first + ((sizes - first) * share).round().long()
        targets = targets.clamp(min=1)
        starts = sizes.cumsum(0) - sizes
        in_block = torch.arange(len(order), device=order.device) - starts[of[order]]
        is_source = in_block >= targets[of[order]]
        most = max(1, int((sizes - targets).max()))
        stays = torch.ones_like(places.patch)
        stays[patches[order[is_source]]] = False
        return cls(
            targets=patches[order[_rows(starts, targets)]],
            sources=patches[order[_rows(starts + targets, sizes - targets).clamp(max=len(order) - 1)]],
            columns=(of[order] * most + in_block - targets[of[order]])[is_source],
            number=stays.cumsum(0) - 1,
            num_groups=int(stays.sum()),
            free=len(patches) - int(anchored.sum()),
        )

    @property
    def fixed(self) -> int:
        """Tokens that are never sources: special tokens and anchors."""
        return len(self.number) - self.free


@kept
def dense_split(layout: TokenLayout, block: tuple[int, int], share: float, anchor: bool, device: torch.device) -> Split:
    """The split of a dense scene; it depends on the layout alone, and making it waits for the device."""
    return Split.of(Places.dense(layout, device), block, share, anchor=anchor)


def _rows(
    start: Tensor,  # [G]
    length: Tensor,  # [G]
) -> Tensor:  # [G, max(1, longest)]
    """Consecutive numbers, the last of them repeated in shorter rows."""
    step = torch.arange(max(1, int(length.max())), device=start.device)
    return start[:, None] + torch.minimum(step, (length - 1).clamp(min=0)[:, None])
