"""Calls of the package that use a fused kernel, for `gpu_kernels` to run with and without it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from geoaccel.attention_kernels import attend_groups
from geoaccel.layout import TokenLayout
from geoaccel.merging import headwise
from geoaccel.merging.key_subset import KeySubset, pick
from geoaccel.merging.temporal import Places, Split
from geoaccel.models.layers.compiled import add_norm, queries_and_keys
from geoaccel.models.layers.rope import rope_tables
from geoaccel.quantization import FP8

HEADS, DIM, SPECIAL, FRAMES = 16, 64, 5, 8
BLOCK, TARGETS = (12, 2), 0.3
"""HTTM: patches and frames per block, and the fraction of targets."""

STRIDE = 4


def fused_calls(device: torch.device, dtype: torch.dtype, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """By name of each fused kernel, a call that uses it if it runs.

    Args:
        device, dtype: Device and dtype.
        tokens: Approximate tokens of the test problems.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = max(2, math.isqrt(max(1, tokens // FRAMES - SPECIAL)))
    layout = TokenLayout(1, FRAMES, (side, side), SPECIAL)
    count, width = layout.tokens_per_scene, HEADS * DIM
    qkv, x, y = random(1, count, 3, HEADS, DIM), random(1, count, width), random(1, count, width)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    rope = rope_tables(layout.positions().to(device), DIM, 100.0, dtype)
    norms = [nn.LayerNorm(DIM).to(device, dtype) for _ in range(2)]
    behind, rounds = nn.LayerNorm(width).to(device, dtype), FP8().quantize(nn.Linear(width, width)).to(device)
    split = Split.of(Places.dense(layout, device), BLOCK, TARGETS, anchor=True)
    plan = headwise.match(q, split)
    merged = plan.merge(q)
    subset = KeySubset(layout.frames, layout.grid, layout.num_special, STRIDE, True, HEADS)
    index = subset.on(device)
    keys = pick(k, v, index)
    groups = ((subset.whole, 0.0), (subset.sampled, math.log(subset.patches_each)))
    return {
        "rotate_heads": lambda: queries_and_keys(qkv, norms[0], norms[1], rope)[0],
        "add_norm": lambda: add_norm(x, y, nn.Identity(), behind)[1],
        "quantize_rows": lambda: rounds(x),
        "match_blocks": lambda: headwise.match(q, split).merge(q),
        "deviation": lambda: headwise.deviation(q, plan, merged),
        "join": lambda: attend_groups(q, *keys, groups),
        "pick": lambda: pick(k, v, index)[0],
    }
