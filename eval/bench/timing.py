"""What an accelerated model saves: latency and memory against the dense model, alternately, on one scene."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from geoaccel.eval.bench.speed import compare, peak_memory
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.token_effects import all_dense
from geoaccel.slots import Slots, fill_slots, filled_slots


@dataclass(frozen=True)
class Measurement:
    """One model against its dense version.

    Attributes:
        latency_ms, dense_latency_ms: Medians of a forward with all heads.
        spread_ms, dense_spread_ms: Interquartile ranges.
        end_to_end_ms: Median including reading the photographs and converting the output to geoaccel's conventions.
        speedup: Dense over accelerated latency.
        peak_memory_gib, dense_peak_memory_gib: During one forward, after the model is loaded.
        frames, height, width: Size of the timed input.
        limit_share: Achieved fraction of the gain if the products of global attention were free; None if nothing was
            merged.
    """

    latency_ms: float
    dense_latency_ms: float
    spread_ms: float
    dense_spread_ms: float
    end_to_end_ms: float
    speedup: float
    peak_memory_gib: float
    dense_peak_memory_gib: float
    frames: int
    height: int
    width: int
    limit_share: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pair:
    """A dense and an accelerated model on the same weights.

    Methods that only merge tokens are removed from the slots and put back between runs at no cost, so that both share
    one set of weights; quantized weights need a second model.
    """

    def __init__(self, job: Job) -> None:
        self.accelerated = Predictor(job)
        self.shared = not job.quantizes
        fast = filled_slots(self.accelerated.model)
        self.dense = job.dense.apply(self.accelerated.model) if self.shared else job.dense.build()
        self.slots: dict[bool, Slots] = {False: fast, True: filled_slots(self.dense)}

    def use(self, *, dense: bool) -> nn.Module:
        """The model, ready to run densely or accelerated."""
        fill_slots(self.slots[dense])
        return self.dense if dense else self.accelerated.model


@torch.inference_mode()
def measure(job: Job, scene: EvalScene, *, repeats: int, warmup: int) -> Measurement:
    """Time a job against the dense model on the photographs of one scene.

    Args:
        job: The model and its methods.
        scene: The scene.
        repeats: Timed runs, at least five.
        warmup: Untimed runs before that.
    """
    pair = Pair(job)
    images, _ = pair.accelerated.load(scene)
    size = (images.shape[-2], images.shape[-1])

    def end_to_end() -> None:
        model: Any = pair.use(dense=False)
        loaded, _ = pair.accelerated.load(scene)
        model.backbone.geometry(model(loaded), size)

    calls: dict[str, Callable[[], Any]] = {"dense": lambda: pair.use(dense=True)(images), "end_to_end": end_to_end}
    if job.accelerated:  # the dense model against itself would only show noise
        calls["accelerated"] = lambda: pair.use(dense=False)(images)
    timings = compare(calls, repeats=repeats, warmup=warmup, device=job.device)
    memory = {}
    for dense in (True, False) if job.accelerated else (True,):
        model = pair.use(dense=dense)
        gc.collect()
        with peak_memory(job.device) as peak:
            model(images)
        memory[dense] = peak[0] / 2**30
    slow = timings["dense"]
    fast = timings.get("accelerated", slow)
    speedup = slow.latency_ms / fast.latency_ms
    share = None
    if job.merges and not all_dense(pair.accelerated.model):  # the methods are still in the slots from the last forward
        cost: Any = pair.accelerated.model.cost
        share = cost(images.shape[1], size).limit_share(speedup)
    return Measurement(
        latency_ms=fast.latency_ms,
        dense_latency_ms=slow.latency_ms,
        spread_ms=fast.spread_ms,
        dense_spread_ms=slow.spread_ms,
        end_to_end_ms=timings["end_to_end"].latency_ms,
        speedup=speedup,
        peak_memory_gib=memory[not job.accelerated],
        dense_peak_memory_gib=memory[True],
        frames=images.shape[1],
        height=size[0],
        width=size[1],
        limit_share=share,
    )
