"""The visual tokens of a batch, checked once and planned sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.token_plan import TokenPlan

IN_A_HOST = "a host takes both as geometry=geometry_features(..., points=True)"
"""Ends messages about ``geo`` and ``xyz``: only what plans without a host has arguments of these names."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Streams of n visual tokens, in the order in which their embeddings replace the placeholders.

    Attributes:
        scores: [n], saliency, higher is more salient.
        sem: [n, ds], features of the 2D encoder.
        geo: [n, dg], features of the geometry encoder.
        frame_of: [n], frame index of each token.
        xyz: [n, 3], world coordinates.
    """

    scores: Tensor
    sem: Tensor
    geo: Tensor | None = None
    frame_of: Tensor | None = None
    xyz: Tensor | None = None

    def __post_init__(self) -> None:
        for name, x in vars(self).items():
            if x is not None and not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(x).__name__}; convert it with torch.as_tensor")
            if name in ("sem", "geo") and x is not None and not x.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")

    def __len__(self) -> int:
        return len(self.scores)

    def check(self) -> None:
        """Refuse streams that do not have one row per token, or are not finite.

        Raises:
            ValueError: Naming the stream.
        """
        n = self.scores.numel()
        wanted = {"scores": "", "sem": ", C", "geo": ", C", "frame_of": "", "xyz": ", 3"}
        for name, more in wanted.items():
            x = getattr(self, name)
            if x is None:
                continue
            if len(x) != n or x.ndim != 1 + bool(more) or (name == "xyz" and x.shape[1] != 3):
                raise ValueError(f"{name} must be [{n}{more}], one row for each of {n} scores, got {list(x.shape)}")
            _check_finite(name, x)

    def samples(self, lengths: tuple[int, ...]) -> list[VisualTokens]:
        """The tokens of each sample."""
        streams = [getattr(self, field.name) for field in fields(self)]
        parts = [[None] * len(lengths) if x is None else x.split(lengths) for x in streams]
        return [VisualTokens(*sample) for sample in zip(*parts, strict=True)]

    def plan(self, plan_sample: Callable[[VisualTokens], TokenPlan], cu_seqlens: Tensor | None) -> TokenPlan:
        """Check everything, plan each sample separately, and concatenate the plans.

        Args:
            plan_sample: Returns the plan of one sample with at least one token.
            cu_seqlens: [samples + 1], start of each sample, and n at the end; None: one sample.

        Raises:
            ValueError: If a stream is wrong, there are no tokens, or the edges do not ascend from 0 to n.
        """
        # Autocast would compute matrix products in its narrow type.
        with torch.no_grad(), torch.autocast(self.scores.device.type, enabled=False):
            self.check()
            samples = self.samples(_lengths(len(self), cu_seqlens))
            plans = [plan_sample(sample) if len(sample) else None for sample in samples]
        present = [plan for plan in plans if plan is not None]
        return TokenPlan.join(present, tuple(len(sample) for sample in samples))


def _lengths(n: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if n == 0:
        raise UserError("there are no visual tokens to choose from; do not reduce text-only prompts")
    if cu_seqlens is None:
        return (n,)
    edges = torch.as_tensor(cu_seqlens).flatten().tolist()
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != n or edges != sorted(edges):
        raise UserError(f"cu_seqlens must ascend from 0 to {n}, the tokens of all samples, got {edges}")
    return tuple(stop - start for start, stop in pairwise(edges))


def _check_finite(name: str, x: Tensor) -> None:
    # The sum reads the stream once and allocates no mask.
    if math.isfinite(float(x.sum(dtype=torch.float32))):
        return
    # An infinite score may be intended, to force a token; an infinite feature is an error.
    bad, what = (x.isnan(), "NaN") if name == "scores" else (~x.isfinite(), "NaN or infinity")
    if bool(bad.any()):
        token = int(bad.reshape(len(x), -1).any(1).nonzero()[0])
        raise UserError(f"{name} contains {what}, first at token {token}; fix the encoder's output")
