"""From a choice of tokens to a plan: the others merge into their most similar kept token, or are dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geoaccel.mllm.joint import Mask, Metric, Stream, best_partner, self_similarity
from geoaccel.mllm.token_plan import NOBODY, Reduce, TokenPlan


def fold(
    streams: Sequence[Stream],
    keep: Tensor,  # [K], int64, ascending
    n: int,
    *,
    reduce: Reduce,
    metric: Metric = "cosine",
    chunk: int = 4096,
    mask: Mask | None = None,
    absorbs: Tensor | None = None,  # [K], bool
) -> TokenPlan:
    """The plan of one sample in which every other token merges into the most similar kept one.

    Args:
        streams: Features of all tokens.
        keep: Tokens that stay.
        n: Number of tokens.
        reduce: Default of the plan.
        metric, chunk, mask: See :func:`geoaccel.mllm.joint.best_partner`.
        absorbs: Which of the kept tokens others may merge into; None: all.
    """
    owner = _stay(keep, n)
    similarity = torch.empty(n, device=keep.device)
    similarity[keep] = self_similarity(streams, keep, metric)
    source = (owner == NOBODY).nonzero()[:, 0]
    if len(source):
        slots = torch.arange(len(keep), device=keep.device)
        slots = slots if absorbs is None else slots[absorbs]
        partner, score = best_partner(streams, source, keep[slots], metric=metric, chunk=chunk, mask=mask)
        owner[source], similarity[source] = slots[partner], score
    return TokenPlan(keep, owner, (len(keep),), (n,), reduce, similarity)


def prune(
    keep: Tensor,  # [K], int64, ascending
    n: int,
    reduce: Reduce = "drop",
) -> TokenPlan:
    """The plan of one sample in which every other token is dropped."""
    return TokenPlan(keep, _stay(keep, n), (len(keep),), (n,), reduce)


def _stay(keep: Tensor, n: int) -> Tensor:  # [n]
    owner = torch.full((n,), NOBODY, dtype=torch.int64, device=keep.device)
    owner[keep] = torch.arange(len(keep), device=keep.device)
    return owner
