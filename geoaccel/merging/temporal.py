"""HTTM's temporal reordering: the blocks of tokens that are compared with each other, and the targets in each.

The frames of a scene are divided into consecutive groups, and the patches of a frame into runs in raster order; a block
is one run of patches over one group of frames. All sizes are nearly equal, for any number of frames and any grid. One
index serves a whole forward: tokens are never moved, only gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.kept import kept
from geoaccel.layout import Packing, TokenLayout

# Inverse powers of the root of x^4 = x + 1: their multiples fill three dimensions evenly.
LATTICE = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)


def num_blocks(layout: TokenLayout, run: int, frames: int) -> tuple[int, int]:
    """Runs of patches in a frame, and groups of frames in a scene.

    Args:
        layout: The dense layout.
        run: Patches per run; actual runs are of nearly equal length, close to this.
        frames: Most frames of a block.
    """
    return max(1, round(layout.num_patches / run)), -(-layout.frames // frames)


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of the T tokens of one scene, dense or packed.

    Attributes:
        frame: [T], int64, from 0.
        position: [T, 2], integer (y, x) as in :meth:`TokenLayout.positions`; special tokens are at (0, 0).
        patches: The tokens that are patches, in order.
        layout: The dense layout.
    """

    frame: Tensor
    position: Tensor
    patches: Tensor
    layout: TokenLayout

    @classmethod
    def dense(cls, layout: TokenLayout, device: torch.device) -> Places:
        """The same for every scene of a batch."""
        frame = torch.arange(layout.frames, device=device)[:, None].expand(-1, layout.tokens_per_frame).flatten()
        tokens = torch.arange(layout.tokens_per_scene, device=device).view(layout.frames, -1)
        position = layout.positions(device).repeat(layout.frames, 1)
        return cls(frame, position, tokens[:, layout.num_special :].flatten(), layout)

    @classmethod
    def packed(cls, packing: Packing, layout: TokenLayout) -> list[Places]:
        """One for every scene; a packed row is at the mean position of its tokens."""
        device, special = packing.positions.device, layout.num_special
        scenes, frames = packing.scene_lengths, layout.frames
        lengths = torch.tensor(packing.frame_lengths).to(device).view(-1, frames)
        number = torch.arange(frames, device=device)
        places = []
        for rows, positions, own in zip(scenes, packing.positions.split(scenes), lengths, strict=True):
            frame = number.repeat_interleave(own, output_size=rows)
            # Special tokens are the first rows of their frame.
            patches = rows - frames * special
            skipped = number.repeat_interleave(own - special, output_size=patches) * special + special
            places.append(cls(frame, positions, torch.arange(patches, device=device) + skipped, layout))
        return places

    def blocks(self, run: int, frames: int) -> Tensor:  # [T], int64
        """The block of every patch, as counted by :func:`num_blocks`; meaningless for special tokens."""
        runs, groups = num_blocks(self.layout, run, frames)
        raster = (self.position[:, 0] - 1) * self.layout.grid[1] + self.position[:, 1] - 1
        # A packed row may lie between patches.
        return (self.frame * groups // self.layout.frames) * runs + (raster * runs // self.layout.num_patches).long()

    def counts(self, run: int, frames: int) -> Tensor:  # [2, runs * groups], int64, on the host
        """Patches of each block, and how many of them are in the first frame.

        For dense tokens they follow from the layout. Packed ones are counted on their device, with one synchronisation.
        """
        layout = self.layout
        runs, groups = num_blocks(layout, run, frames)
        if len(self.frame) == layout.tokens_per_scene:
            of_run, of_group = (
                (torch.arange(total, device="cpu") * parts // total).bincount(minlength=parts)
                for total, parts in ((layout.num_patches, runs), (layout.frames, groups))
            )
            anchors = of_run.new_zeros(groups, runs)
            anchors[0] = of_run
            return torch.stack([of_group[:, None] * of_run, anchors]).flatten(1)
        of = self.blocks(run, frames)[self.patches]
        both = torch.stack([torch.ones_like(of), (self.frame[self.patches] == 0).long()])
        return of.new_zeros(2, runs * groups).index_add_(1, of, both).cpu()


@dataclass(frozen=True, eq=False)
class Split:
    """Targets and sources of every block; the same for all heads.

    Blocks are rows of equal length: the last token of a shorter row is repeated, which does not change any match.

    Attributes:
        targets: [G, m], target tokens.
        sources: [G, s], tokens that merge into a target of their own block.
        columns: [n], index of each of the n sources in the flattened ``sources``.
        source_tokens: [n], the sources in the same order.
        number: [T], the group of every token that is not a source; tokens keep their order.
        num_groups: Number of tokens that are not sources.
        free: Number of tokens that may be sources: patches that are not anchors.
    """

    targets: Tensor
    sources: Tensor
    columns: Tensor
    source_tokens: Tensor
    number: Tensor
    num_groups: int
    free: int

    @classmethod
    def of(cls, places: Places, block: tuple[int, int], share: float, *, anchor: bool = False) -> Split:
        """Mark an evenly spread fraction of the patches of each block as targets, at least one.

        Patches are ranked by the fractional part of a linear form of column, row and frame. The lowest are spread
        nearly evenly over the image, at different places in every frame.

        Args:
            places: Positions of one scene.
            block: Size of a block: patches of a frame, and frames.
            share: Fraction of the patches.
            anchor: In addition, all patches of the first frame are targets.
        """
        patches = places.patches
        frame, position, of = places.frame[patches], places.position[patches].double(), places.blocks(*block)[patches]
        sizes, first = places.counts(*block)
        filled = sizes > 0
        if not filled.all():
            of = (filled.cumsum(0) - 1).to(of.device)[of]
        sizes, first = sizes[filled], first[filled] * anchor
        # Counts are known on the host; indices only on the device.
        targets = (first + ((sizes - first) * share).round().long()).clamp(min=1)
        sources = sizes - targets
        total, most = int(sources.sum()), max(1, int(sources.max()))
        starts, merged, passed, own = torch.stack(
            [sizes.cumsum(0) - sizes, targets, sources.cumsum(0) - sources, sources]
        ).to(of.device)
        rank = (position[:, 1] * LATTICE[0] + position[:, 0] * LATTICE[1] + frame * LATTICE[2]) % 1
        # Sorted by block, within a block anchors first, then by rank.
        order = (2 * of + rank.masked_fill((frame == 0) & anchor, -0.5)).argsort(stable=True)
        ordered = patches[order]
        row = torch.arange(len(own), device=of.device).repeat_interleave(own, output_size=total)
        in_row = torch.arange(total, device=of.device) - passed[row]
        source_tokens = ordered[(starts + merged)[row] + in_row]
        stays = torch.ones_like(places.frame).index_fill_(0, source_tokens, 0)
        return cls(
            targets=ordered[_rows(starts, merged, max(1, int(targets.max())))],
            sources=ordered[_rows(starts + merged, own, most).clamp(max=len(ordered) - 1)],
            columns=row * most + in_row,
            source_tokens=source_tokens,
            number=stays.cumsum(0) - 1,
            num_groups=len(stays) - total,
            free=len(patches) - int(first.sum()),
        )

    @property
    def fixed(self) -> int:
        """Number of tokens that are never sources: special tokens and anchors."""
        return len(self.number) - self.free


def _rows(
    start: Tensor,  # [G]
    length: Tensor,  # [G]
    longest: int,
) -> Tensor:  # [G, longest]
    """Consecutive numbers, the last one repeated in shorter rows."""
    step = torch.arange(longest, device=start.device)
    return start[:, None] + torch.minimum(step, (length - 1).clamp(min=0)[:, None])


Splits = tuple[Split | None, Split | None]
"""Splits of queries and of keys; None: not merged."""


@kept
def dense_splits(
    layout: TokenLayout,
    block: tuple[int, int],
    shares: tuple[float | None, float | None],
    anchor: bool,
    device: torch.device,
) -> Splits:
    """Splits of dense tokens, from the layout of one scene, with the arguments of :meth:`Split.of`.

    None as a fraction leaves tokens unmerged. A thousand frames of 1036 patches take 64 MiB.
    """
    places = Places.dense(layout, device)
    queries, keys = (None if share is None else Split.of(places, block, share, anchor=anchor) for share in shares)
    return queries, keys
