"""FLOPs of a network's heads, counted and not derived: they are convolutions of many kinds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


def head_flops(model: nn.Module, size: tuple[int, int], heads: Collection[str] | None = None) -> float:
    """FLOPs of the heads for one frame of H x W, from a forward without data.

    Args:
        model: A network of this package.
        size: (H, W) in pixels.
        heads: Which heads; all by default.
    """

    network: Any = type(model)
    wanted = tuple(model.heads if heads is None else heads)  # type: ignore[arg-type]
    return _counted(network, json.dumps(model.config), size, wanted)


@functools.lru_cache(maxsize=64)
def _counted(network: Callable[..., nn.Module], config: str, size: tuple[int, int], heads: tuple[str, ...]) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    with torch.device("meta"):
        model = network(**json.loads(config)).eval().requires_grad_(False)
        images = torch.empty(1, 1, 3, *size)
    totals = []
    for wanted in (heads, ()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images, heads=wanted)
        totals.append(counter.get_total_flops())
    return float(totals[0] - totals[1])
