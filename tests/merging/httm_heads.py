"""Random heads, and HTTM on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext
from geoaccel.layout import TokenLayout
from geoaccel.merging.httm import HTTM

HEADS, DIM = 3, 8


def random_heads(layout: TokenLayout, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # each [B, A, N, D]
    """Tokens in clusters that differ from head to head: some heads have many outliers, some none."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.batch, HEADS, layout.tokens_per_scene, DIM)
    centres = torch.randn(layout.batch, HEADS, 6, DIM, generator=generator)
    which = torch.randint(6, shape[:-1], generator=generator)
    base = centres.gather(2, which[..., None].expand(shape))
    noise = torch.tensor([0.02, 0.3, 1.0])[None, :, None, None]
    q, k, v = (base + noise * torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


def mix(method: HTTM, layout: TokenLayout, *qkv: Tensor) -> tuple[Tensor, Any]:
    """What one attention answers, and what it says that it did."""
    mixer = method.mixer("sdpa")
    context = AttentionContext("global", 0, layout)
    mixed, restore = mixer(*qkv, torch.zeros(layout.batch, layout.tokens_per_scene, HEADS * DIM), context)
    assert restore is None
    return mixed, mixer.effect
