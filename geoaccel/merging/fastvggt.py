"""FastVGGT: Training-Free Acceleration of Visual Geometry Transformer (Shen et al., ICLR 2026, arXiv 2509.02560)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from geoaccel.attention import AttentionContext
from geoaccel.kept import kept
from geoaccel.layout import TokenLayout
from geoaccel.merging import released
from geoaccel.merging.joint import JointMerging
from geoaccel.merging.method import register
from geoaccel.merging.partition import Partition, random_of_cells, scene_mask


@register
@dataclass(frozen=True)
class FastVGGT(JointMerging):
    """Merges patches into a random one of each 2 x 2 cell, anywhere in the scene, in every global attention.

    Targets are all tokens of the first frame, the special tokens of all frames, and one patch of every cell; every
    tenth token of the scene stays unmerged; all others join the most similar target, by the attention's input. Needs no
    training. Attention takes about 0.35^2 of its time, matching about a third of what is left.

    Differs from the paper in:
        - Odd grids have smaller cells at their edges; the paper does not mention them.
        - A token that is both protected and a target counts once.
        - pi3, which the paper does not cover, has no reference frame: the first one is the anchor there too, unless
          ``anchor=False``.
        - A single frame, or so few tokens that merging would gain too little, is left dense (``bypass=False``: only a
          single frame is).

    Where the published code differs is documented in :mod:`geoaccel.merging.released`; ``released_code`` reproduces it.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=FastVGGT(ratio=0.5))

    Attributes:
        seed: For the random targets, and nothing else.
    """

    name: ClassVar[str] = "fastvggt"
    seed: int = 33

    def num_sources(self, layout: TokenLayout) -> int:
        """Tokens of a scene that may merge into a target; each protected target frees one more."""
        return int((1 - self.protect) * self.num_candidates(layout))

    def partition(self, context: AttentionContext, layout: TokenLayout, device: torch.device) -> Partition:
        """The same for all scenes and layers: independent of the tokens."""
        return _partition(self, layout, device)


@kept
def _partition(method: FastVGGT, layout: TokenLayout, device: torch.device) -> Partition:
    if method.released_code:
        return released.fastvggt_partition(layout, method.protect, method.seed).to(device)
    patches = random_of_cells(layout, method.seed)
    targets = scene_mask(patches[None], layout, special=True, anchor=True if method.anchor else None)
    return Partition.from_masks(targets, every_nth(layout.tokens_per_scene, method.protect)).to(device)


def every_nth(tokens: int, share: float) -> torch.Tensor:  # [1, N], bool
    """Mark a fraction of N tokens at equal distances, starting with the first."""
    mask = torch.zeros(1, tokens, dtype=torch.bool, device="cpu")
    count = int(share * tokens)
    if count:
        places = torch.arange(count, dtype=torch.float64, device="cpu")
        mask[:, (places / share + 1e-6).long()] = True
    return mask
