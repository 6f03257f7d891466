"""The transformer blocks of a network, by name and in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext

PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2")
MLPS = (("mlp.fc1",), ("mlp.w12", "mlp.w3"))
"""Linear layers of a plain and of a gated MLP whose inputs do not come out of a nonlinearity alone."""


def find_blocks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The transformer blocks (``norm1``, ``attn``, ``norm2``, ``mlp``) with float layers, in their order.

    Returns:
        By name of the block, which of ``MLPS`` its MLP has.
    """
    modules = dict(model.named_modules())

    def has(name: str, parts: tuple[str, ...]) -> bool:
        return all(_is_float(modules.get(f"{name}.{part}")) for part in parts)

    return {name: mlp for name in modules for mlp in MLPS if has(name, PARTS + mlp)}


def _is_float(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.LayerNorm) and module.elementwise_affine)


def blocks_of(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of layers grouped by block; a layer outside of all blocks is its own group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = name
        for part in (".attn.", ".mlp."):
            block = block.partition(part)[0]
        groups.setdefault(block, []).append(name)
    return groups


@torch.no_grad()
def running_order(
    model: nn.Module,
    images: Tensor,  # [B, S, 3, H, W]
) -> tuple[list[str], list[str]]:
    """The blocks that one forward runs, in the order of their first call.

    Returns:
        Those of encoder and aggregator, which run once, and those in the heads, which may run several times because of
        refinements and chunks of frames.
    """
    blocks = {name: model.get_submodule(name) for name in find_blocks(model)}
    calls: dict[str, list[AttentionContext]] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: calls.setdefault(name, []).append(args[1]))
        for name, block in blocks.items()
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    trunk = [name for name, seen in calls.items() if seen[0].kind != "head"]
    return trunk, [name for name in calls if name not in trunk]
