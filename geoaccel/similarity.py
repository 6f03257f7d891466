"""Cosine matching without the N x N matrix: each source token finds its most similar destination.

Similarities exist one chunk at a time; on CUDA with Triton, one tile (``geoaccel.kernels.match``). Ties go to the
destination with the lower index, so that a plan does not depend on the chunk size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.kernels.choice import launching_on, use_compiled
from geoaccel.precision import own_precision

CHUNK_ELEMENTS = 1 << 24
"""Most similarities held at once: 64 MiB in float32."""

UNIT_NUMBERS = 1 << 26
"""Elements normalised at a time, if there are more than twice as many: the copies are in float32."""

EPSILON = 1e-6
"""Least norm: a zero token has cosine 0 with everything, not NaN."""


def unit(
    x: Tensor,  # [.., D]
) -> Tensor:  # [.., D]
    """Vectors of length one, in their own dtype; the length is computed in float32."""
    rows = x.numel() // max(1, x.shape[-1])
    if x.numel() > 2 * UNIT_NUMBERS and not (torch.is_grad_enabled() and x.requires_grad):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        step = max(1, UNIT_NUMBERS // x.shape[-1])
        for part, into in zip(x.reshape(rows, -1).split(step), out.view(rows, -1).split(step), strict=True):
            into.copy_(_unit(part))
        return out
    return _unit(x)


def _unit(x: Tensor) -> Tensor:
    norm = x.float().square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    return (x / norm).to(x.dtype)


def best_match(
    source: Tensor,  # [.., n, D]
    target: Tensor,  # [.., m, D]
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:  # [.., n] float32, [.., n] int64
    """Cosine similarity to, and index of, the best target of every source token.

    Args:
        source: Tokens to match. Leading dimensions are independent rows, the same in both.
        target: Candidates, at least one.
        chunk_elements: Most similarities held at once; at most the number of elements of `source`, so that short
            sequences need little memory, and at least those of one source token.

    Raises:
        ValueError: If there are no targets or the rows differ.
    """
    if target.shape[-2] == 0 or source.shape[:-2] != target.shape[:-2]:
        raise ValueError(
            f"every source token needs a target in its own row, got source {list(source.shape)} and "
            f"target {list(target.shape)}"
        )
    target = unit(target)
    with own_precision(source.device):  # compared in their own dtype
        return _best_match(source, target, chunk_elements)


def _best_match(
    source: Tensor,  # [.., n, D]
    target: Tensor,  # [.., m, D], of length one
    chunk_elements: int,
) -> tuple[Tensor, Tensor]:  # [.., n] float32, [.., n] int64
    if use_compiled(source):
        from geoaccel.kernels.match import best_match as compiled

        shape = source.shape[:-1]
        with launching_on(source.device):
            score, where = compiled(*(t.reshape(-1, *t.shape[-2:]) for t in (unit(source), target)))
        return score.view(shape), where.view(shape)
    rows = source[..., 0, 0].numel() if source.shape[-2] else 1
    target = target.transpose(-1, -2)
    step = max(1, min(chunk_elements, source.numel()) // max(1, rows * target.shape[-1]))
    best, index = [], []
    for part in source.split(step, dim=-2):
        score, where = (unit(part) @ target).max(dim=-1)
        best.append(score.float())
        index.append(where)
    return torch.cat(best, dim=-1), torch.cat(index, dim=-1)
