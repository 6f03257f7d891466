"""Token plans, the result of every reduction: which visual tokens stay, and into which of them the others merge.

A plan does not contain features. The same plan shortens the embeddings, the position ids and every side stream:

    plan = plan_merge(scores, sem, geo)
    plan.apply(x)       # [n, C] -> [K, C], tokens merged into those that stay; differentiable in x
    plan.gather(ids)    # [n, ...] -> [K, ...], the rows of those that stay

It is not a :class:`geoaccel.plan.MergePlan`. There a group is its mean and has no position. Here one token of each
group keeps its slot and its position, the others may be added to it, and samples of a batch differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import UserError

Reduce = Literal["add_mean", "mean", "weighted", "drop"]
"""How a group becomes one token, with t_k the kept token and C the others:

- ``add_mean``: t_k + mean of C, t_k if C is empty; the paper's. Not a mean: the norm of similar tokens doubles.
- ``mean``: mean of t_k and C.
- ``weighted``: mean of t_k and C, weighted by the softmax of their similarity to t_k.
- ``drop``: t_k.
"""

NOBODY = -1
"""Owner of a token that is dropped."""


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """A choice of K of n tokens, and the assignment of the others. Samples of a batch are concatenated and never mix.

    Attributes:
        keep: [K], int64, which tokens stay; strictly ascending.
        owner: [n], int64, the entry of ``keep`` that each token merges into, -1 for a dropped token. A kept token is in
            its own group.
        lengths: Kept tokens of each sample.
        source_lengths: Tokens of each sample before.
        reduce: Default of :meth:`apply`.
        similarity: [n], float32, of each token to the one that it merges into; None if not measured.
    """

    keep: Tensor
    owner: Tensor
    lengths: tuple[int, ...]
    source_lengths: tuple[int, ...]
    reduce: Reduce = "add_mean"
    similarity: Tensor | None = None

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.keep) or sum(self.source_lengths) != len(self.owner):
            raise ValueError(
                f"a plan that keeps {len(self.keep)} of {len(self.owner)} tokens needs lengths that sum to these, got "
                f"{list(self.lengths)} and {list(self.source_lengths)}"
            )

    @classmethod
    def join(cls, plans: Sequence[TokenPlan], source_lengths: tuple[int, ...]) -> TokenPlan:
        """Concatenate the plans of single samples.

        Args:
            plans: Plans of one sample each, by the same method; at least one.
            source_lengths: Tokens of every sample, in order; those with none have no plan.
        """
        keep, owner, lengths, token, row = [], [], [], 0, 0
        rest = iter(plans)
        for length in source_lengths:
            if length == 0:
                lengths.append(0)
                continue
            plan = next(rest)
            keep.append(plan.keep + token)
            owner.append(torch.where(plan.owner == NOBODY, NOBODY, plan.owner + row))
            lengths.append(plan.num_kept)
            token, row = token + length, row + plan.num_kept
        measured = [plan.similarity for plan in plans if plan.similarity is not None]
        similarity = torch.cat(measured) if len(measured) == len(plans) else None
        return cls(torch.cat(keep), torch.cat(owner), tuple(lengths), source_lengths, plans[0].reduce, similarity)

    @property
    def num_tokens(self) -> int:
        """n over all samples."""
        return len(self.owner)

    @property
    def num_kept(self) -> int:
        """K over all samples."""
        return len(self.keep)

    @property
    def effective_ratio(self) -> float:
        """1 - K / n, the fraction removed."""
        return 1 - self.num_kept / self.num_tokens

    @property
    def assign(self) -> Tensor:  # [n], int64
        """``owner`` under the name of the paper's a(c)."""
        return self.owner

    @cached_property
    def count(self) -> Tensor:  # [K], int64
        """Number of tokens merged into each kept one; 0 if it stays as it is."""
        return torch.bincount(self.owner[self._folded], minlength=self.num_kept)

    @cached_property
    def cu_seqlens(self) -> Tensor:  # [samples + 1], int32
        """Start of each sample among the kept tokens, in the format of kernels for packed sequences."""
        edges = [0, *accumulate(self.lengths)]
        return torch.tensor(edges, dtype=torch.int32, device=self.keep.device)

    def to(self, device: torch.device | str) -> TokenPlan:
        """The plan on another device."""
        similarity = None if self.similarity is None else self.similarity.to(device)
        return replace(self, keep=self.keep.to(device), owner=self.owner.to(device), similarity=similarity)

    def gather(
        self,
        x: Tensor,  # [n, ...]
    ) -> Tensor:  # [K, ...]
        """The rows of the tokens that stay: ids, positions, labels.

        Raises:
            ValueError: If x does not have the plan's number of rows.
        """
        self._check(x)
        return x.index_select(0, self.keep)

    def apply(
        self,
        x: Tensor,  # [n, ...]
        reduce: Reduce | None = None,
    ) -> Tensor:  # [K, ...]
        """Merge every group into its kept token.

        Sums are accumulated in float32, or in float64 if x is; deterministic.

        Args:
            x: One row per token: fused embeddings, or any parallel stream.
            reduce: Overrides the plan's default.

        Raises:
            ValueError: If x does not have the plan's number of rows, for an unknown ``reduce``, or for ``weighted``
                without similarities in the plan.
        """
        reduce = self.reduce if reduce is None else reduce
        if reduce not in get_args(Reduce):
            raise UserError(f"reduce={reduce!r}; known: {', '.join(get_args(Reduce))}")
        stays = self.gather(x)
        if reduce == "drop":
            return stays
        wide = x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))
        if reduce == "add_mean":
            out = wide.index_select(0, self.keep) + self._bags(wide, self._folded, self.count)
        else:
            out = self._bags(wide, self._grouped, self.count + 1, self._weight if reduce == "weighted" else None)
        return out.view(stays.shape).to(x.dtype)

    def _bags(self, x: Tensor, members: Tensor, sizes: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean, or weighted sum, of consecutive runs of members; zeros for empty runs. One pass, without atomics."""
        starts = sizes.cumsum(0) - sizes
        if weight is None:
            return F.embedding_bag(members, x, starts, mode="mean")
        return F.embedding_bag(members, x, starts, mode="sum", per_sample_weights=weight[members].to(x.dtype))

    @cached_property
    def _folded(self) -> Tensor:  # [tokens folded into another], in the order of their owners
        away = torch.ones_like(self.owner, dtype=torch.bool)
        away[self.keep] = False
        members = (away & (self.owner != NOBODY)).nonzero()[:, 0]
        return members[self.owner[members].argsort(stable=True)]

    @cached_property
    def _grouped(self) -> Tensor:  # [tokens in a group], in the order of their owners
        members = (self.owner != NOBODY).nonzero()[:, 0]
        return members[self.owner[members].argsort(stable=True)]

    @cached_property
    def _weight(self) -> Tensor:  # [n], float32, sums to 1 over each group
        if self.similarity is None:
            raise UserError("reduce='weighted' needs similarities, which this plan lacks; use 'mean'")
        members = self._grouped
        owner, similarity = self.owner[members], self.similarity[members]
        highest = torch.full_like(self.keep, -torch.inf, dtype=torch.float32)
        highest = highest.scatter_reduce(0, owner, similarity, "amax")
        exponential = (similarity - highest[owner]).exp()
        total = F.embedding_bag(
            torch.arange(len(members), device=members.device),
            exponential[:, None],
            (self.count + 1).cumsum(0) - (self.count + 1),
            mode="sum",
        )[:, 0]
        return torch.zeros_like(self.similarity).index_copy(0, members, exponential / total[owner])

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or len(x) != self.num_tokens:
            raise ValueError(f"this plan takes [{self.num_tokens}, ...], got {list(x.shape)}")
