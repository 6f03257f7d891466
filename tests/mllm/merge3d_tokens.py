"""Tokens to merge, and the plan of them by brute force."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.3, 0.1])


SEM = torch.tensor([(1, 0), (1, 0), (0, 1), (0, 1), (0.8, 0.6), (0.6, 0.8)])


GEO = torch.tensor([(1, 0), (0.6, 0.8), (0.8, 0.6), (0, 1), (0, 1), (1, 0)])
FUSED = torch.tensor([(i, 10.0 * i) for i in range(6)])


def random_tokens(n: int, sem: int = 32, geo: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(n, generator=generator),
        torch.randn(n, sem, generator=generator),
        torch.randn(n, geo, generator=generator),
    )
