"""The merge plan: which token goes into which group. Every merging method makes one.

A plan is index tensors and nothing else. It can be printed, cached, compared and tested on a CPU; merging takes the
mean of every group, unmerging copies a group's row back to its members.

    plan = MergePlan.from_owner(owner)      # owner[n]: the token that represents token n
    short = plan.merge(x)                   # [.., N, C] -> [.., M, C]
    x_like = plan.unmerge(short)            # [.., M, C] -> [.., N, C]

Leading dimensions (batch, or batch and heads) are independent rows. Rows may have different numbers of groups: M is the
largest, and the groups at the end of a shorter row are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.kernels.choice import launching_on, use_compiled


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A partition of N tokens into groups, for each row.

    Attributes:
        group_of: [.., N], int64, the group of each token; every token is in exactly one. The groups of a row are
            numbered from 0 without gaps.
        num_groups: M, that of the row with the most groups.
    """

    group_of: Tensor
    num_groups: int

    @classmethod
    def from_owner(
        cls,
        owner: Tensor,  # [.., N], int64
    ) -> MergePlan:
        """A plan from the owner (representative) of each token; groups are numbered in the order of the owners.

        Args:
            owner: Index of the owner within the row. An owner must own itself.
        """
        own = torch.arange(owner.shape[-1], device=owner.device)
        number = (owner == own).cumsum(-1)  # from 1
        return cls(number.gather(-1, owner) - 1, int(number[..., -1].max()))

    @classmethod
    def identity(cls, rows: tuple[int, ...], tokens: int, device: torch.device | str | None = None) -> MergePlan:
        """Every token is its own group."""
        return cls(torch.arange(tokens, device=device).expand(*rows, tokens), tokens)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.group_of.shape[-1]

    @cached_property
    def counts(self) -> Tensor:  # [.., M], int64
        """Tokens in each group; 0 for the empty groups of a shorter row."""
        size = self._rows * self.num_groups
        if self.group_of.device.type == "cpu":
            flat = torch.bincount(self._slots, minlength=size)
        else:  # CUDA's bincount synchronises to read its minimum and maximum
            flat = self._slots.new_zeros(size).index_add_(0, self._slots, torch.ones_like(self._slots))
        return flat.view(*self.group_of.shape[:-1], self.num_groups)

    @cached_property
    def lengths(self) -> Tensor:  # [..], int64
        """Number of nonempty groups in each row."""
        return (self.counts > 0).sum(-1)

    @cached_property
    def log_counts(self) -> Tensor:  # [.., M], float32
        """Log of the group sizes, the logit bias of proportional attention; -inf for empty groups."""
        return self.counts.float().log()

    @cached_property
    def effective_ratio(self) -> float:
        """1 - M / N over all rows."""
        return 1 - float(self.lengths.double().mean()) / self.num_tokens

    def merge(
        self,
        x: Tensor,  # [.., N, C]
        weight: Tensor | None = None,  # [.., N], positive
    ) -> Tensor:  # [.., M, C]
        """Mean of every group, accumulated in float32; zeros for empty groups.

        Args:
            x: Tokens, with the leading dimensions of the plan.
            weight: How many tokens each row of x already represents; None: one.
        """
        self._check(x, self.num_tokens)
        flat = x.reshape(-1, x.shape[-1])
        shape = (*self.group_of.shape[:-1], self.num_groups, x.shape[-1])
        if weight is None and use_compiled(flat):
            from geoaccel.kernels.match import segment_mean

            with launching_on(x.device):
                return segment_mean(flat, self._members, self._starts, self.counts.flatten()).view(shape)
        # embedding_bag is torch's segment mean: one pass, no atomics, float32 accumulation for narrow types.
        if weight is None:
            return F.embedding_bag(self._members, flat, self._starts, mode="mean").view(shape)
        weighted = flat.float() * weight.reshape(-1, 1)
        total = F.embedding_bag(self._members, weighted, self._starts, mode="sum").view(shape)
        return (total / self.merge_weights(weight).clamp(min=1e-12)[..., None]).to(x.dtype)

    def merge_weights(
        self,
        weight: Tensor,  # [.., N]
    ) -> Tensor:  # [.., M], float32
        """Sum of the weights in every group."""
        out = torch.zeros(self._rows * self.num_groups, dtype=torch.float32, device=weight.device)
        out = out.scatter_add_(0, self._slots, weight.float().flatten())
        return out.view(*self.group_of.shape[:-1], self.num_groups)

    def unmerge(
        self,
        y: Tensor,  # [.., M, C]
    ) -> Tensor:  # [.., N, C]
        """Copy every group's row to all its tokens."""
        self._check(y, self.num_groups)
        rows = y.reshape(-1, y.shape[-1]).index_select(0, self._slots)
        return rows.view(*self.group_of.shape, y.shape[-1])

    def _check(self, x: Tensor, length: int) -> None:
        wanted = (*self.group_of.shape[:-1], length)
        if x.shape[:-1] != wanted:
            raise ValueError(f"this plan takes [{', '.join(map(str, wanted))}, C], got {list(x.shape)}")

    @property
    def _rows(self) -> int:
        return self.group_of[..., 0].numel()

    @cached_property
    def _slots(self) -> Tensor:  # [rows * N], group ids that are unique over all rows
        rows = torch.arange(self._rows, device=self.group_of.device)
        return (self.group_of.reshape(self._rows, -1) + rows[:, None] * self.num_groups).flatten()

    @cached_property
    def _members(self) -> Tensor:  # [rows * N], all tokens in the order of their groups
        return self._slots.argsort(stable=True)

    @cached_property
    def _starts(self) -> Tensor:  # [rows * M], where each group begins among the members
        counts = self.counts.flatten()
        return counts.cumsum(0) - counts
