"""Ours: the groups of patches whose tokens are most alike merge, as Co-Me merges those of least confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.merging.confidence import Tap
from geoaccel.merging.gain import Extra
from geoaccel.merging.group_merging import GroupMerging
from geoaccel.merging.method import register
from geoaccel.merging.rates import Kind


@register
@dataclass(frozen=True)
class Alike(GroupMerging):
    """Merges groups of patches whose tokens are most alike, from one block of the encoder to the heads.

    Everything but the choice of groups is Co-Me's (:mod:`geoaccel.merging.come`), which merges where a predictor
    expects the network to be least confident. Similarity needs no predictor and no training, on any checkpoint: tokens
    that carry the same information lose little by merging. The evidence is two small networks on rendered scenes: with
    the same groups, depth loses a seventh to a tenth of what it loses with the paper's choice, and cameras lose less
    (docs/results/merging.md). On large networks and photographs the two have not been compared; there the paper finds
    confidence better than similarity.

    Groups are 3 x 3 patches, and 2 x 2 on grids with a side of fewer than 24, unless ``group`` says otherwise.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=Alike(ratio=0.3))
    """

    name: ClassVar[str] = "alike"

    def ranking(self, tap: Tap) -> Likeness:
        return Likeness()


class Likeness:
    """Ranks groups by the spread of their tokens around the mean."""

    def __call__(self, patches: Tensor, grid: tuple[int, int], group: tuple[int, int]) -> Tensor:
        return spread(patches, grid, group)

    def work(self, patches: int, kind: Kind) -> Extra:
        return Extra(read=8 * patches * kind.width)


def spread(
    patches: Tensor,  # [B, S, h * w, C]
    grid: tuple[int, int],
    group: tuple[int, int],
) -> Tensor:  # [B, S, gh, gw], float32
    """Summed squared distance of a group's tokens from their mean, per token that merging would remove."""

    def total(values: Tensor) -> Tensor:  # [B, S, h * w, c] to [B * S, c, gh, gw]
        maps = values.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(maps.float(), group, ceil_mode=True, divisor_override=1)

    members = total(patches.new_ones(1, 1, patches.shape[2], 1))
    norms = torch.linalg.vector_norm(
        patches, dim=-1, keepdim=True, dtype=torch.promote_types(patches.dtype, torch.float32)
    )
    apart = (total(norms.square()) - total(patches).square().sum(1, keepdim=True) / members).clamp(min=0)
    # A single patch at an edge saves nothing, and comes last.
    found = (apart / (members - 1)).masked_fill(members == 1, torch.inf)
    return found[:, 0].unflatten(0, patches.shape[:2])
