"""HTTM's per-head steps: matching inside blocks, the outlier filter, attention with ragged queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.attention_kernels import attend, attend_heads
from geoaccel.kernels.fused import fused
from geoaccel.merging.temporal import Split
from geoaccel.plan import MergePlan
from geoaccel.similarity import CHUNK_ELEMENTS, EPSILON, best_match

CPU_CHUNK_ELEMENTS = 1 << 20
"""Similarities, or other numbers, held at once on a CPU, so that they stay in the cache."""

PADDING = 0.1
"""Queries are padded to the longest head, for one kernel call, if that adds at most this fraction."""


def chunk_elements(device: torch.device) -> int:
    """Number of elements that a temporary may have."""
    return CPU_CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS


@torch.no_grad()
def match(
    x: Tensor,  # [B, A, T, D]
    split: Split,
) -> MergePlan:
    """Match every source to the most similar target of its block, for each head separately."""
    batch, heads, _, _ = x.shape
    group_of = split.number.expand(batch, heads, -1).clone()
    compiled = fused("match_blocks", x)
    if compiled is not None:
        best = compiled(x, split.sources, split.targets, EPSILON)
        found = split.number[split.targets].expand(batch, heads, -1, -1).gather(-1, best).flatten(2)
    else:
        found = _match_in_chunks(x, split)
    group_of[..., split.source_tokens] = found[..., split.columns]
    return MergePlan(group_of, split.num_groups)


def _match_in_chunks(
    x: Tensor,  # [B, A, T, D]
    split: Split,
) -> Tensor:  # [B, A, G * s]
    """The group of every source, a few blocks at a time."""
    batch, heads, _, _ = x.shape
    most = split.sources.shape[1]
    step = max(1, chunk_elements(x.device) // (batch * heads * most * split.targets.shape[1]))
    found = []
    for targets, sources in zip(split.targets.split(step), split.sources.split(step), strict=True):
        a, b = (x.index_select(2, index.flatten()).unflatten(2, index.shape) for index in (sources, targets))
        best = best_match(a, b, chunk_elements=chunk_elements(x.device))[1]
        found.append(split.number[targets].expand(batch, heads, -1, -1).gather(-1, best).flatten(2))
    return torch.cat(found, dim=2)


@torch.no_grad()
def split_outliers(
    x: Tensor,  # [B, A, T, D]
    plan: MergePlan,
    merged: Tensor,  # [B, A, M, D]
    count: int,
    *,
    shared: bool,
) -> tuple[MergePlan, list[int]]:
    """Remove the tokens farthest from their group's mean from their groups.

    The nearest token of every group stays, so that no group is left empty.

    Args:
        x: Tokens.
        plan: Their groups, none of which is empty.
        merged: Means of the groups.
        count: Number to remove over all heads of a scene, capped so that one token per group stays.
        shared: All heads compete; otherwise each removes ``count`` / A, rounded down.

    Returns:
        The plan with every outlier in its own group, after the existing ones, and the number of groups for each head of
        each scene, B * A numbers. They differ if heads compete, which synchronises with a GPU.
    """
    batch, heads, tokens, _ = x.shape
    row = (batch, -1) if shared else (batch * heads, -1)
    key = _order(deviation(x, plan, merged).view(row))
    slots = plan.group_of + plan.num_groups * torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    nearest = torch.full((batch * heads * plan.num_groups,), torch.iinfo(torch.int64).max, device=x.device)
    nearest.scatter_reduce_(0, slots.flatten(), key.flatten(), "amin")
    key = key.masked_fill(key == nearest[slots].view(row), -1)
    heads_in_row = heads if shared else 1
    count = min(count if shared else count // heads, heads_in_row * (tokens - plan.num_groups))
    if count <= 0:
        return plan, [plan.num_groups] * batch * heads
    # Not kthvalue: on CUDA it uses one thread block per row, and has no deterministic version.
    least = key.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    outlier = (key >= least).view(batch, heads, tokens)
    alone = outlier.cumsum(-1)
    group_of = torch.where(outlier, plan.num_groups - 1 + alone, plan.group_of)
    taken = alone[..., -1].flatten().tolist() if shared else [count] * batch * heads
    return MergePlan(group_of, plan.num_groups + max(taken)), [plan.num_groups + own for own in taken]


def deviation(
    x: Tensor,  # [B, A, T, D]
    plan: MergePlan,
    merged: Tensor,  # [B, A, M, D]
) -> Tensor:  # [B, A, T], float32
    """Squared distance of every token from its group's mean."""
    compiled = fused("deviation", x)
    if compiled is not None:
        return compiled(x, plan.group_of, merged)
    step = max(1, chunk_elements(x.device) // (x[..., 0].numel() // x.shape[2] * x.shape[3]))
    parts = []
    for part, group_of in zip(x.split(step, dim=2), plan.group_of.split(step, dim=2), strict=True):
        mean = MergePlan(group_of, plan.num_groups).unmerge(merged)
        parts.append((mean.float() - part.float()).square_().sum(-1))
    return torch.cat(parts, dim=-1)


def _order(
    distance: Tensor,  # [.., n], float32, not negative
) -> Tensor:  # [.., n], int64
    """Distinct numbers in the order of the distances; among equal distances the first ranks highest."""
    # The bits of non-negative floats are ordered like the floats.
    last = torch.arange(distance.shape[-1] - 1, -1, -1, device=distance.device)
    return (distance.view(torch.int32).long() << 32) | last


def attend_ragged(
    q: Tensor,  # [B, A, M, D]
    k: Tensor,  # [B, A, K, D]
    v: Tensor,  # [B, A, K, D]
    lengths: Sequence[int],
    key_bias: Tensor | None,  # [B, A, K]
    kernel: str,
) -> Tensor:  # [B, A, M, D]
    """Attention where every head of every scene has its own number of queries; outputs beyond them are undefined.

    One call for all heads if they have nearly the same number and, on a CPU, no bias, which costs more there than many
    calls. A kernel for ragged rows would replace the loop.

    Args:
        q, k, v: Queries, keys and values.
        lengths: Queries of each head of each scene, B * A numbers.
        key_bias: Added to the logits of each key.
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
    """
    if q.shape[2] * len(lengths) <= (1 + PADDING) * sum(lengths):
        if key_bias is None:
            return attend(q, k, v, kernel=kernel)
        if q.device.type != "cpu" and kernel == "sdpa":
            return attend_heads(q, k, v, key_bias)
    rows = []
    for row, length in enumerate(lengths):
        at = divmod(row, q.shape[1])
        bias = None if key_bias is None else key_bias[at]
        mixed = attend(q[at][None, None, :length], k[at][None, None], v[at][None, None], key_bias=bias, kernel=kernel)
        rows.append(F.pad(mixed, (0, 0, 0, q.shape[2] - length)))
    return torch.cat(rows).view(q.shape)
