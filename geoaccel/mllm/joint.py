"""Joint similarity over several streams of features, and the best partner of every token, without the n x K matrix.

Similarities are computed in float32, in chunks of tokens. If the best two are closer than float32 can resolve, the row
is recomputed in float64, so that an assignment equals the float64 one. It does not depend on the device, on the
precision set for matrix products, or on the size of the chunks. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["cosine", "dot"]

Mask = Callable[[Tensor, Tensor], Tensor]
"""From indices of tokens [m] and candidates [K] to the allowed pairs [m, K], bool, at least one in every row."""

FULL, TF32, BF16 = 2.0**-16, 2.0**-8, 2.0**-5
DOUBT = {"highest": FULL, "ieee": FULL, "high": TF32, "tf32": TF32, "medium": BF16, "bf16": BF16, "none": BF16}
"""Gaps between two similarities that float32 products cannot resolve, relative to |a| |b|, by the names of torch's two
settings."""

EQUAL = 1e-12
"""The same for float64: a smaller gap is a tie."""

TINY = 1e-30
"""Least norm to divide by: the similarities of a zero token are 0, not NaN."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Features with their weight.

    Attributes:
        x: [n, C].
        weight: Factor of this stream's similarity, 1 / tau.
    """

    x: Tensor
    weight: float = 1.0

    @cached_property
    def norm(self) -> Tensor:  # [n], float32
        return torch.linalg.vector_norm(self.x, dim=-1, dtype=torch.promote_types(self.x.dtype, torch.float32)).float()

    def rows(self, index: Tensor, metric: Metric) -> Tensor:  # [m, C], float32
        """Features of some tokens, of length one for cosines; zeros stay zeros."""
        rows = self.x.index_select(0, index).float()
        return rows.mul_(1 / self.norm[index, None].clamp(min=TINY)) if metric == "cosine" else rows

    def exact_rows(self, index: Tensor, metric: Metric) -> Tensor:  # [m, C], float64
        rows = self.x.index_select(0, index).double()
        return F.normalize(rows, dim=-1, eps=TINY) if metric == "cosine" else rows

    def lengths(self, index: Tensor, metric: Metric) -> Tensor:  # [m], float32
        """Lengths of :meth:`rows`."""
        norm = self.norm[index]
        return (norm > 0).float() if metric == "cosine" else norm


def best_partner(
    streams: Sequence[Stream],
    source: Tensor,  # [m], int64
    target: Tensor,  # [K], int64
    *,
    metric: Metric,
    chunk: int,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:  # [m] int64, [m] float32
    """Most similar target of each source, as an index into ``target``, and the similarity.

    The similarity is the weighted sum over the streams of cosines or dot products. It is the logarithm of the paper's
    product of exponentials, which would overflow.

    Args:
        streams: Features of all tokens.
        source: Tokens to match, at least one.
        target: Candidates, at least one.
        metric: ``cosine`` or ``dot``.
        chunk: Sources at a time; memory is linear in it.
        mask: Which pairs are allowed; None: all.
    """
    candidates = [stream.rows(target, metric).mul_(stream.weight) for stream in streams]
    longest = [stream.lengths(target, metric).amax() * stream.weight for stream in streams]
    exact: list[Tensor] = []
    doubt = _doubt(target.device)
    found, how_similar = [], []
    for part in source.split(chunk):
        allowed = None if mask is None else mask(part, target)
        similarity = _sum_of_products([stream.rows(part, metric) for stream in streams], candidates, allowed)
        best, where = similarity.max(dim=-1)
        second = similarity.scatter_(1, where[:, None], -torch.inf).amax(dim=-1)
        del similarity
        pairs = zip(streams, longest, strict=True)
        scale = torch.stack([stream.lengths(part, metric) * length for stream, length in pairs]).sum(0)
        again = (best - second <= doubt * scale).nonzero()[:, 0]
        if len(again):
            exact = exact or [stream.exact_rows(target, metric).mul_(stream.weight) for stream in streams]
            rows = [stream.exact_rows(part[again], metric) for stream in streams]
            similarity = _sum_of_products(rows, exact, None if allowed is None else allowed[again])
            highest = similarity.amax(dim=-1)
            tied = similarity >= (highest - EQUAL * scale[again])[:, None]
            where[again] = tied.to(torch.uint8).argmax(dim=-1)
            best[again] = highest.float()
        found.append(where)
        how_similar.append(best)
    return torch.cat(found), torch.cat(how_similar)


def _doubt(device: torch.device) -> float:
    try:
        return DOUBT[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch has no common setting once one backend was set separately
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        return DOUBT[backend.matmul.fp32_precision]


def self_similarity(
    streams: Sequence[Stream],
    index: Tensor,  # [m], int64
    metric: Metric,
) -> Tensor:  # [m], float32
    """Similarity of tokens to themselves."""
    return torch.stack([stream.lengths(index, metric).square() * stream.weight for stream in streams]).sum(0)


def _sum_of_products(rows: Sequence[Tensor], candidates: Sequence[Tensor], allowed: Tensor | None) -> Tensor:  # [m, K]
    total = rows[0] @ candidates[0].T
    for left, right in zip(rows[1:], candidates[1:], strict=True):
        total.addmm_(left, right.T)
    return total if allowed is None else total.masked_fill_(~allowed, -torch.inf)
