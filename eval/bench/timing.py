"""What an accelerated model saves: latency and memory beside the dense model, in turns, on one scene."""

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
    """One model against its dense self.

    Attributes:
        latency_ms, dense_latency_ms: Medians of a forward with all heads.
        spread_ms, dense_spread_ms: Differences of the quartiles.
        end_to_end_ms: Median with reading the photographs and bringing the output into house conventions.
        speedup: Dense over accelerated latency.
        peak_memory_gib, dense_peak_memory_gib: During one forward, after the model is loaded.
        frames, height, width: What was timed.
        limit_share: Share of what could be gained at most, were the products of global attention free, that was
            gained; None where nothing was merged.
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

    Methods that only merge tokens are taken out of the slots and put back between the turns, which costs nothing, so
    that one set of weights serves both; quantized weights need a second model.
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
    """Time a job against its dense self on the photographs of one scene.

    Args:
        job: The model and its methods.
        scene: What it runs on.
        repeats: Runs that count, at least five.
        warmup: Runs before that.
    """
    pair = Pair(job)
    images, _ = pair.accelerated.load(scene)
    size = (images.shape[-2], images.shape[-1])

    def end_to_end() -> None:
        model: Any = pair.use(dense=False)
        loaded, _ = pair.accelerated.load(scene)
        model.backbone.geometry(model(loaded), size)

    calls: dict[str, Callable[[], Any]] = {"dense": lambda: pair.use(dense=True)(images), "end_to_end": end_to_end}
    if job.accelerated:  # the dense model beside itself would only show the noise
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
    if job.merges and not all_dense(pair.accelerated.model):  # methods stand in the slots since the last forward
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
