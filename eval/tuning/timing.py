"""Measured time of the plan against the dense network: alternating forwards, and each layer's attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.api import accelerate
from geoaccel.eval.bench.speed import Stopwatch, compare
from geoaccel.eval.tuning.trials import Change
from geoaccel.merging.layers import Layers
from geoaccel.quantization.swap import prepare, restore_linears
from geoaccel.slots import fill_slots, filled_slots

REPEATS, LAYER_REPEATS = 5, 3


@torch.inference_mode()
def timed(
    model: nn.Module,
    change: Change,
    images: Tensor,  # [1, S, 3, H, W]
) -> dict[str, Any]:
    """Median times of the plan's forwards, including bypassing.

    Args:
        model: Dense model; restored afterwards.
        change: The plan.
        images: On the device of the model.

    Returns:
        ``dense_ms``, ``plan_ms``, ``speedup``, ``spread_ms`` (the larger interquartile range of both), and for
        each layer of global attention ``layers_dense_ms`` and ``layers_plan_ms``.
    """
    layers = Layers(tuple((layer, layer, method) for layer, method in enumerate(change.layers)))
    quantize = prepare(model, change.quantization, keep_original=True) if change.quantization else lambda: None

    slots = {plan: filled_slots(accelerate(model, layers=layers if plan else None)) for plan in (True, False)}

    def use(plan: bool) -> None:
        fill_slots(slots[plan])
        if plan:
            quantize()
        elif change.quantization:
            restore_linears(model)

    def forward(plan: bool) -> Callable[[], Any]:
        def call() -> Any:
            use(plan)
            return model(images)

        return call

    try:
        found = compare({"dense": forward(False), "plan": forward(True)}, repeats=REPEATS, device=images.device)
        parts = {}
        for plan in (False, True):
            use(plan)
            parts[plan] = _layers_ms(model, images)
    finally:
        use(False)
    dense, fast = found["dense"], found["plan"]
    return {
        "dense_ms": dense.latency_ms,
        "plan_ms": fast.latency_ms,
        "speedup": dense.latency_ms / fast.latency_ms,
        "spread_ms": max(dense.spread_ms, fast.spread_ms),
        "layers_dense_ms": parts[False],
        "layers_plan_ms": parts[True],
    }


def _layers_ms(model: nn.Module, images: Tensor) -> list[float]:
    """Median time of each global attention, excluding projections."""
    network: Any = model
    sites = network.backbone.sites(model)["global"]
    runs: list[list[float]] = []
    for _ in range(LAYER_REPEATS):
        watches = [Stopwatch(site.mixer, images.device) for site in sites]
        for site, watch in zip(sites, watches, strict=True):
            site.mixer = watch
        try:
            model(images)
        finally:
            for site, watch in zip(sites, watches, strict=True):
                site.mixer = watch.mixer
        runs.append([1000 * watch.seconds for watch in watches])
    return [statistics.median(run[layer] for run in runs) for layer in range(len(sites))]
