"""FLOPs of a network's heads, counted rather than derived: they are convolutions of many kinds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from geoaccel.network_config import NetworkConfig


def head_flops(model: nn.Module, size: tuple[int, int], heads: tuple[str, ...]) -> float:
    """FLOPs of the heads for one frame of H x W, from a forward on the meta device.

    Args:
        model: A network of this package.
        size: (H, W) in pixels.
        heads: Which heads.
    """
    network: Any = type(model)
    config: Any = model.config
    return _counted(network, config, size, heads)


@functools.lru_cache(maxsize=64)
def _counted(
    network: Callable[[NetworkConfig], nn.Module], config: NetworkConfig, size: tuple[int, int], heads: tuple[str, ...]
) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    with torch.device("meta"):
        model = network(config).eval().requires_grad_(False)
        images = torch.empty(1, 1, 3, *size)
    totals = []
    for wanted in (heads, ()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images, heads=wanted)
        totals.append(counter.get_total_flops())
    return float(totals[0] - totals[1])
