"""FastVGGT: Training-Free Acceleration of Visual Geometry Transformer (Shen et al., ICLR 2026, arXiv 2509.02560)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from geoaccel.attention import AttentionContext
from geoaccel.layout import TokenLayout
from geoaccel.merging.joint import JointMerging
from geoaccel.merging.method import register
from geoaccel.merging.partition import CELL, Partition, random_of_cells, released_cells, scene_mask


@register
@dataclass(frozen=True)
class FastVGGT(JointMerging):
    """Every global attention merges patches into a random one of each 2 x 2 cell, anywhere in the scene.

    Targets are all tokens of the first frame, the special tokens of all frames, and one patch of every cell; every
    tenth token of the scene stays alone; all others join the target that the attention's input is most like. Needs no
    training. Attention takes about 0.35^2 of its time, matching about a third of what is left.

    Differs from the paper in:
        - Targets are drawn once in a forward and serve all layers; the published code draws the same ones anew in
          each.
        - Odd grids have smaller cells at their edges. The published pattern is skewed there.
        - A protected token that is also a target is one token. The published code attends to it twice.
        - Every scene of a batch is matched by itself. The published code takes the first one's matching for all.
        - Sources are compared in the dtype of the tokens. The published code compares in bfloat16.
        - One frame, or so few tokens that matching would cost more than it saves, is left dense.

    With ``released_code`` the first four and the comparison are as published, but only one scene at a time is taken.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=FastVGGT(ratio=0.5))

    Attributes:
        seed: Of the draw of targets, and of nothing else.
    """

    name: ClassVar[str] = "fastvggt"
    seed: int = 33

    def num_sources(self, layout: TokenLayout) -> int:
        """Targets that are protected leave as many more sources."""
        return int((1 - self.protect) * self.num_candidates(layout))

    def partition(self, context: AttentionContext, layout: TokenLayout, device: torch.device) -> Partition:
        """The same for all scenes and layers: it looks at no token."""
        if self.released_code:
            generator = torch.Generator().manual_seed(self.seed)  # on the CPU, so that every device draws the same
            height, width = layout.grid
            shape = (layout.frames - 1, height // CELL, width // CELL)
            patches = released_cells(torch.randint(CELL * CELL, shape, generator=generator, device="cpu"), layout.grid)
            patches = torch.cat([patches[:1], patches])  # the first frame is all targets anyhow
        else:
            patches = random_of_cells(layout, self.seed)
        targets = scene_mask(patches[None], layout, special=True, anchor=True if self.anchor else None)
        protected = every_nth(layout.tokens_per_scene, self.protect, whole_steps=self.released_code)
        partition = Partition.from_masks(targets, protected, repeat=self.released_code)
        return partition.to(device)


def every_nth(tokens: int, share: float, *, whole_steps: bool = False) -> torch.Tensor:  # [1, N], bool
    """Mark a share of the tokens at equal distances, beginning with the first.

    Args:
        tokens: N.
        share: Of the tokens.
        whole_steps: Round the distance down, as the published code does; a share that is not 1 / n then leaves the
            last frames out.
    """
    mask = torch.zeros(1, tokens, dtype=torch.bool, device="cpu")
    count = int(share * tokens)
    if count:
        places = torch.arange(count, dtype=torch.float64, device="cpu")
        mask[:, (places * (tokens // count if whole_steps else 1 / share) + 1e-6).long()] = True
    return mask
