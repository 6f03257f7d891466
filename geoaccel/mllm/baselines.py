"""Baselines: other methods to choose K of n visual tokens, with the same kind of plan as Merge3D.

    plan = BASELINES["divprune"](ratio=0.1).plan(scores, sem, geo)

All take the inputs of Merge3D and use those they need; K is the same function of n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.budget import Budget, Share
from geoaccel.mllm.fold import fold, prune
from geoaccel.mllm.joint import Stream
from geoaccel.mllm.token_plan import NOBODY, TokenPlan
from geoaccel.mllm.tokens import IN_A_HOST, VisualTokens
from geoaccel.plan import MergePlan
from geoaccel.registry import Registry
from geoaccel.similarity import best_match


@dataclass(frozen=True)
class Baseline(Share):
    """A method with its knobs.

    Attributes:
        name: Registered name.
    """

    name: ClassVar[str]

    def plan(
        self,
        scores: Tensor,  # [n]
        sem: Tensor,  # [n, ds]
        geo: Tensor | None = None,  # [n, dg]
        *,
        cu_seqlens: Tensor | None = None,  # [samples + 1]
        frame_of: Tensor | None = None,  # [n]
        xyz: Tensor | None = None,  # [n, 3]
    ) -> TokenPlan:
        """Decide which visual tokens stay, and where the others merge or whether they are dropped.

        Args:
            scores, sem, geo, cu_seqlens, frame_of, xyz: As in :func:`geoaccel.mllm.plan_merge`.

        Raises:
            ValueError: If the streams differ in length, hold NaN, or lack what the method needs.
        """
        return VisualTokens(scores, sem, geo, frame_of, xyz).plan(self.plan_sample, cu_seqlens)

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        """The plan of one sample with at least one token."""
        raise NotImplementedError

    def _need(self, stream: Tensor | None, what: str) -> Tensor:
        if stream is None:
            raise UserError(f"{self.name} needs {what}, which is missing; {IN_A_HOST}")
        return stream


Method = TypeVar("Method", bound=type[Baseline])

BASELINES: Registry[type[Baseline]] = Registry("baseline")


def register(method: Method) -> Method:
    """Register a baseline under its name; a class decorator."""
    BASELINES.register(method.name, method)
    return method


@register
@dataclass(frozen=True)
class RandomChoice(Baseline):
    """K tokens at random, the others are dropped.

    Attributes:
        seed: Seed of the random order. Samples of the same length lose the same tokens, on every device.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(tokens), generator=generator)[: self.kept(len(tokens))]
        return prune(order.sort().values.to(tokens.scores.device), len(tokens))


@register
@dataclass(frozen=True)
class VisionZip2D(Baseline):
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467) on the 2D encoder alone.

    Most of the budget goes to the most salient tokens, which stay as they are. The rest goes to contextual tokens,
    evenly spaced among the others, and every remaining token merges into the most similar contextual one.

    Differs from the paper in:
        - Tokens are compared by the features given; the paper compares the encoder's keys.
        - Contextual tokens reach to the end of the sequence; the released code rounds the step down.

    Attributes:
        contextual_share: Fraction of the budget; that of the paper for LLaVA with 64 tokens.
    """

    name: ClassVar[str] = "visionzip-2d"
    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.contextual_share < 1:
            raise UserError(f"contextual_share={self.contextual_share!r} is not in (0, 1)")

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        n, kept = len(tokens), self.kept(len(tokens))
        contextual = min(kept - 1, max(1, math.floor(self.contextual_share * kept)))
        dominant = Budget(num_tokens=kept - contextual).most_salient(tokens.scores, None)
        if contextual == 0:
            return prune(dominant, n, "add_mean")
        left = torch.ones(n, dtype=torch.bool, device=dominant.device)
        left[dominant] = False
        rest = left.nonzero()[:, 0]
        places = torch.arange(contextual, device=rest.device) * len(rest) // contextual
        keep = torch.cat([dominant, rest[places]]).sort().values
        return fold([Stream(self.features(tokens))], keep, n, reduce="add_mean", absorbs=left[keep])

    def features(self, tokens: VisualTokens) -> Tensor:
        """Features that contextual tokens are compared by."""
        return tokens.sem


@register
@dataclass(frozen=True)
class VisionZip3D(VisionZip2D):
    """VisionZip on the geometry encoder alone: tokens are compared by its features, and ``scores`` should be its own.

    :func:`geoaccel.mllm.geometry.geometry_features` gives both.
    """

    name: ClassVar[str] = "visionzip-3d"

    def features(self, tokens: VisualTokens) -> Tensor:
        return self._need(tokens.geo, "geo, the geometry features")


@register
@dataclass(frozen=True)
class ToMe(Baseline):
    """Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461) in front of the language model.

    In each round tokens alternate between two sets. Each token of the first set finds the most similar one of the
    second, and the most similar pairs are averaged, weighted by the number of tokens that each represents.

    Differs from the paper in:
        - All rounds are run at once on the features given, each as large as the sets allow; the paper runs a small one
          in every block of the encoder, on its keys.
    """

    name: ClassVar[str] = "tome"

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        features, kept = tokens.sem.float(), self.kept(len(tokens))
        keep = torch.arange(len(tokens), device=features.device)
        owner, size = keep, torch.ones(len(tokens), device=features.device)
        while len(keep) > kept:
            score, partner = best_match(features[::2], features[1::2])
            closest = score.sort(descending=True, stable=True).indices[: len(keep) - kept]
            stands = torch.arange(len(keep), device=features.device)
            stands[2 * closest] = 2 * partner[closest] + 1
            round_plan = MergePlan.from_owner(stands)
            keep = keep[stands == torch.arange(len(keep), device=features.device)]
            owner = round_plan.group_of[owner]
            features, size = round_plan.merge(features, size), round_plan.merge_weights(size)
        return TokenPlan(keep, owner, (kept,), (len(tokens),), "mean")


@register
@dataclass(frozen=True)
class DivPrune(Baseline):
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the K most diverse tokens.

    The first is the one whose nearest neighbour is farthest, each further one the farthest from all chosen so far, by
    cosine. The others are dropped. Holds the n x n similarities of a sample.
    """

    name: ClassVar[str] = "divprune"

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        kept = self.kept(len(tokens))
        rows = torch.nn.functional.normalize(tokens.sem.float(), dim=-1)
        similarity = rows @ rows.T
        similarity.fill_diagonal_(-torch.inf)
        chosen = torch.empty(kept, dtype=torch.int64, device=rows.device)
        nearest = similarity.amax(dim=-1)
        for place in range(kept):
            chosen[place] = token = nearest.argmin()
            nearest = similarity[token].clone() if place == 0 else torch.maximum(nearest, similarity[token])
            nearest[chosen[: place + 1]] = torch.inf
        return prune(chosen.sort().values, len(tokens))


@register
@dataclass(frozen=True)
class VoxelPooling(Baseline):
    """The mean of all tokens in each voxel, as in LLaVA-3D (Zhu et al., ICCV 2025, arXiv 2409.18125).

    Voxels are as small as the budget allows. The rest of the budget keeps the most salient of the tokens that would
    be merged. The most salient token of a voxel keeps its slot.
    """

    name: ClassVar[str] = "voxel"
    halvings: ClassVar[int] = 40

    def plan_sample(self, tokens: VisualTokens) -> TokenPlan:
        xyz = self._need(tokens.xyz, "xyz, the world coordinates").double()
        n, kept = len(tokens), self.kept(len(tokens))
        cube = self._cubes(xyz, kept)
        order = tokens.scores.sort(descending=True, stable=True).indices
        by_cube = order[cube[order].argsort(stable=True)]  # voxel by voxel, the most salient of each first
        sizes = torch.bincount(cube)
        first = by_cube[sizes.cumsum(0) - sizes]
        alone = torch.ones(n, dtype=torch.bool, device=xyz.device)
        alone[first] = False
        spare = order[alone[order]][: kept - len(first)]
        keep = torch.cat([first, spare]).sort().values
        owner = torch.full((n,), NOBODY, dtype=torch.int64, device=xyz.device)
        owner[keep] = torch.arange(kept, device=xyz.device)
        return TokenPlan(keep, torch.where(owner == NOBODY, owner[first][cube], owner), (kept,), (n,), "mean")

    def _cubes(self, xyz: Tensor, kept: int) -> Tensor:  # [n], numbers without gaps
        """The smallest voxels, found by bisection, of which at most ``kept`` are occupied."""
        xyz = xyz - xyz.amin(dim=0)
        extent = float(xyz.max()) or 1.0
        steps = 1 << 20  # cubes along an axis at the smallest side, so that three indices fit into one integer
        best = torch.zeros(len(xyz), dtype=torch.int64, device=xyz.device)
        small, large = extent / steps, 2 * extent
        for _ in range(self.halvings):
            side = math.sqrt(small * large)
            x, y, z = (xyz / side).floor().long().unbind(-1)
            cube = ((x * 2 * steps + y) * 2 * steps + z).unique(return_inverse=True)[1]
            if int(cube.max()) < kept:
                best, large = cube, side
            else:
                small = side
        return best
