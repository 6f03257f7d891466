"""Co-Me: Confidence-Guided Token Merging (Chen et al., CVPR 2026, arXiv 2511.14751)."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.merging.confidence import ConfidencePredictor, Tap, predictor_for, shipped_predictors
from geoaccel.merging.gain import Extra
from geoaccel.merging.group_merging import GroupMerging, Ranking
from geoaccel.merging.groups import group_means, num_groups
from geoaccel.merging.method import register
from geoaccel.merging.rates import Kind

Choice = Literal["least_confident", "most_confident", "random"]


@register
@dataclass(frozen=True)
class CoMe(GroupMerging):
    """Merges the groups of patches in which the network will be least confident, from the encoder to the heads.

    After a block of the image encoder a small predictor ranks the patches of all images by the confidence that the
    network will have. Half of all groups of 3 x 3 patches are replaced by their mean token in everything that follows,
    and copied back to nine places where a head reads. ``scripts/training/train_confidence.py`` trains a predictor for a
    checkpoint in minutes; those of the checkpoints in the package are included.

    Differs from the paper in:
        - Any grid: groups at the lower and right edge are smaller where a side is not a multiple of 3, and are weighted
          by their size. The paper needs multiples of 3.
        - The position of a merged token is the exact centre of its patches, between two of them where a side is even.
          The published code truncates to integers; in groups of 2 x 2 every merged token would move by half a patch up
          and left.
        - The predictor normalises the tokens that it reads, as backbones differ in their scale, and its width shrinks
          with the backbone's below C = 1024, so that its own attention stays cheap.
        - ``direct`` merges the same groups; the first version of the paper took 4 patches in a row.
        - If there are so few tokens that merging would gain too little, they are left dense, unless ``bypass=False``.

    On the minis' grids of 16 x 16 patches, three patches are a fifth of the image side; on the paper's, with 36, a
    twelfth. ``group=None`` takes 2 x 2 there.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=CoMe(ratio=0.3))

    Attributes:
        group: (height, width) of a group in patches; None: 3 x 3, and 2 x 2 where the grid is small.
        choose: Which groups merge: the ``least_confident`` ones, or, as controls, those that are ``most_confident``, or
            ``random`` ones.
        predictor: Confidence predictor: ``auto`` (the one included for this checkpoint), a path, a predictor object, or
            ``untrained`` (for timing networks with random weights).
        seed: For the random choice.
    """

    name: ClassVar[str] = "come"
    group: tuple[int, int] | None = (3, 3)
    choose: Choice = "least_confident"
    predictor: ConfidencePredictor | str | os.PathLike[str] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.predictor, ConfidencePredictor | str | os.PathLike):
            raise UserError(f"come: predictor={self.predictor!r} is not a predictor; give one, its path, or 'auto'")
        if self.choose == "random" and self.predictor != "auto":
            raise UserError("come: choose='random' does not use a predictor; leave out one of the two")
        if self.choose != "random" and self.seed != 0:
            raise UserError(f"come: seed={self.seed} applies to choose='random', not {self.choose!r}; leave one out")

    def files(self) -> list[Path]:
        """Files that it reads: the bundled predictors, one of which fits the checkpoint."""
        return shipped_predictors() if self.choose != "random" and self.predictor == "auto" else []

    def ranking(self, tap: Tap) -> Ranking:
        if self.choose == "random":
            return Chance(self.seed)
        # A copy: it follows the model's device and dtype.
        return Confidence(copy.deepcopy(predictor_for(tap, self.predictor)), highest=self.choose == "most_confident")


class Confidence:
    """Ranks groups by the mean predicted confidence of their patches.

    Args:
        predictor: Confidence predictor; follows the tokens' device and dtype.
        highest: The most confident groups merge.
    """

    def __init__(self, predictor: ConfidencePredictor, *, highest: bool = False) -> None:
        self.predictor = predictor
        self.highest = highest

    @torch.no_grad()
    def __call__(self, patches: Tensor, grid: tuple[int, int], group: tuple[int, int]) -> Tensor:
        with torch.inference_mode(False):
            self.predictor.to(patches.device, patches.dtype)
        means = group_means(self.predictor(patches, grid), group)
        return -means if self.highest else means

    def work(self, patches: int, kind: Kind) -> Extra:
        return self.predictor.work(patches, kind.head_dim)


class Chance:
    """Ranks groups at random; the same on every device, whatever the batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, patches: Tensor, grid: tuple[int, int], group: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (patches.shape[1], *num_groups(grid, group))
        scores = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        return scores.to(patches.device).expand(len(patches), -1, -1, -1)

    def work(self, patches: int, kind: Kind) -> Extra:
        return Extra()
