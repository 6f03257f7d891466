"""Batching of segments of different lengths by padding: one kernel call for many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 4
"""Minimum number of segments to batch."""

PADDED = 2.0
"""Most padded places per token; segments that differ more are processed one by one."""

CHUNK_PLACES = 65_536
"""Padded places at a time: queries, keys and values are copied to them."""


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Padded places of the T tokens of S segments, L places per segment.

    Attributes:
        tokens: [S, L], the token at each place; in the padding the first one of the segment.
        bias: [S, L], on the logits of each place; minus infinity in the padding.
        places: [T], index of each token's place over all segments.
    """

    tokens: Tensor
    bias: Tensor
    places: Tensor

    @classmethod
    def of(
        cls,
        bias: Tensor,  # [T]
        lengths: tuple[int, ...],
    ) -> SideBySide:
        """Lay out segments; copies their lengths to the device."""
        device, longest = bias.device, max(lengths)
        size = torch.tensor(lengths, device=device)
        start = (size.cumsum(0) - size)[:, None]
        step = torch.arange(longest, device=device)
        inside = step < size[:, None]
        tokens = torch.where(inside, start + step, start)
        segment = torch.arange(len(lengths), device=device).repeat_interleave(size, output_size=len(bias))
        places = torch.arange(len(bias), device=device) + (longest * segment - start[segment, 0])
        return cls(tokens, bias[tokens].masked_fill(~inside, -torch.inf), places)

    def attend(
        self,
        q: Tensor,  # [1, A, T, D]
        k: Tensor,  # [1, A, T, D]
        v: Tensor,  # [1, A, T, D]
        run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # [1, A, T, D]
        """Attention of every token to its segment.

        Args:
            q, k, v: Queries, keys and values.
            run: Attention of a batch [s, A, L, D] with a bias [s, L] on the keys.
        """
        step = max(1, CHUNK_PLACES // self.tokens.shape[1])
        parts = []
        for tokens, bias in zip(self.tokens.split(step), self.bias.split(step), strict=True):
            rows = [t[0].transpose(0, 1).index_select(0, tokens.flatten()) for t in (q, k, v)]  # [s * L, A, D] each
            asked, keys, values = (t.unflatten(0, tokens.shape).transpose(1, 2) for t in rows)
            parts.append(run(asked, keys, values, bias).transpose(1, 2).flatten(0, 1))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.index_select(0, self.places).transpose(0, 1)[None]


def fit(lengths: tuple[int, ...]) -> bool:
    """Whether there are enough segments, of sufficiently similar length."""
    return len(lengths) >= LEAST and max(lengths) * len(lengths) <= PADDED * sum(lengths)
