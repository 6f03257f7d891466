"""Fraction of the attention time saved by a method that is spent on matching and aggregation.

    python scripts/figures/matching_share.py model=vggt-mini frames=64
    python scripts/figures/matching_share.py model=pi3-mini frames=32 methods=httm,litevggt device=cuda

One forward of a rendered scene records the queries, keys and values of every global attention. On those, dense
attention and each method alternate; a timer in the kernel separates attention from the rest. The fraction is
``rest / (dense - attention)`` over all layers, from medians. One line of JSON per method.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import geoaccel
from command_settings import run_with_settings
from geoaccel.api import place_mixer
from geoaccel.attention import AttentionContext, DenseMixer, ForwardState, Mixer
from geoaccel.attention_kernels import KERNELS, attend
from geoaccel.errors import UserError
from geoaccel.eval.bench.speed import synchronize
from geoaccel.eval.data.synthetic import sequence
from geoaccel.merging import MERGING, AttentionMerging
from geoaccel.runtime import hardware, pick_device, versions

SETTINGS = {"model": "vggt-mini", "frames": "64", "methods": "httm,litevggt,fastvggt", "repeats": "5", "device": "auto"}
Call = tuple[Tensor, Tensor, Tensor, Tensor, AttentionContext]


class Recorder(Mixer):
    """Dense attention that records its inputs."""

    def __init__(self) -> None:
        self.inputs = ForwardState()
        self.calls: list[Call] = []

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        self.inputs = replace(context.state)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> tuple[Tensor, None]:
        self.calls.append((q, k, v, x, context))
        return attend(q, k, v), None


class Clock:
    """A kernel that measures its own time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        synchronize(self.device)
        began = time.perf_counter()
        out = KERNELS["sdpa"](q, k, v, bias)
        synchronize(self.device)
        self.seconds += time.perf_counter() - began
        return out


@torch.inference_mode()
def measure(settings: dict[str, str]) -> list[dict[str, Any]]:
    """One row per method."""
    device, frames = pick_device(settings["device"]), int(settings["frames"])
    methods: dict[str, AttentionMerging] = {}
    for name in settings["methods"].split(","):
        method = MERGING[name](bypass=False)
        if not isinstance(method, AttentionMerging):
            raise UserError(f"methods={name}: it merges the token stream, not in attention; choose another method")
        methods[name] = method
    model: Any = geoaccel.load_model(settings["model"], device=device)
    size = (model.preprocess.size, model.preprocess.size)
    recorder = Recorder()
    place_mixer(model, recorder)
    model(sequence(0, frames=frames, size=size).images.to(device), heads=[])
    clock = Clock(device)
    KERNELS.register("clock", clock)
    dense = [DenseMixer("clock")] * len(recorder.calls)
    mixers: dict[str, list[Any]] = {"dense": dense} | {n: m.mixers("clock", len(dense)) for n, m in methods.items()}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in mixers}
    for turn in range(1 + int(settings["repeats"])):
        for name, layers in mixers.items():
            found = timed(layers, recorder, clock)
            if turn:
                runs[name].append(found)
    middle = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    rows = []
    for name in methods:
        total, attention = middle[name]
        rows.append(
            {
                "method": name,
                "model": settings["model"],
                "frames": frames,
                "tokens": recorder.calls[0][0].shape[2],
                "dense_attention_s": round(middle["dense"][0], 3),
                "attention_s": round(attention, 3),
                "matching_and_aggregation_s": round(total - attention, 3),
                "share_of_what_is_saved": round((total - attention) / (middle["dense"][0] - attention), 3),
                "hardware": hardware(device),
                **versions(),
            }
        )
    return rows


def timed(layers: list[Any], recorder: Recorder, clock: Clock) -> tuple[float, float]:
    """Seconds of all layers, and of attention alone."""
    state = replace(recorder.inputs, notes={})
    clock.seconds = 0.0
    synchronize(clock.device)
    began = time.perf_counter()
    fresh = [AttentionContext("global", c.index, c.layout, state=state) for *_, c in recorder.calls]
    for mixer, (q, *_), context in zip(layers, recorder.calls, fresh, strict=True):
        mixer.prepare(q.shape[1], q.shape[3], q.device, context)
    for mixer, (q, k, v, x, _), context in zip(layers, recorder.calls, fresh, strict=True):
        mixed, restore = mixer(q, k, v, x, context)
        if restore is not None:
            restore(mixed.transpose(1, 2).flatten(2))
    synchronize(clock.device)
    return time.perf_counter() - began, clock.seconds


def main() -> None:
    def work(settings: dict[str, str]) -> None:
        for row in measure(settings):
            print(json.dumps(row), flush=True)

    sys.exit(run_with_settings("matching_share", SETTINGS, work))


if __name__ == "__main__":
    main()
