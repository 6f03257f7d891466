"""Comparable measurements of time and memory.

All candidates run in one process on the same weights, dtype, kernel and heads, and alternate, so that a slowdown of the
machine affects all of them. Reported is the median of at least five runs after a warm-up (three if the caller has
little time and reports the number of runs). Ratios are comparable between machines, seconds are not.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext, Mixer, Restore
from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.freed_memory import give_back_freed_memory
from geoaccel.runtime import MIN_REPEATS

FEWEST_IN_TIME = 3
"""Minimum runs of each candidate, even if time is short."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one candidate.

    Attributes:
        latency_ms: Median.
        spread_ms: Interquartile range; smaller differences are not significant.
        runs_ms: All runs in order.
    """

    latency_ms: float
    spread_ms: float
    runs_ms: tuple[float, ...]


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = MIN_REPEATS,
    warmup: int = 1,
    seconds: float = math.inf,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time candidates alternately.

    Args:
        candidates: By name, callables without arguments.
        repeats: Timed runs of each, at least five.
        warmup: Untimed runs of each before that.
        seconds: After this many no new round starts, once each candidate has three runs; for interactive use.
        device: Device on which they run; a CUDA device is synchronised.

    Raises:
        ValueError: For fewer than five repeats.
    """
    if repeats < MIN_REPEATS:
        raise UserError(f"repeats={repeats}: give at least {MIN_REPEATS}, for a reliable median")
    runs: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for turn in range(warmup + repeats):
        if turn >= warmup + FEWEST_IN_TIME and time.perf_counter() - started > seconds:
            break
        for name, call in candidates.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warmup:
                runs[name].append(1000 * (time.perf_counter() - began))
    return {name: _timing(times) for name, times in runs.items()}


def synchronize(device: torch.device | str) -> None:
    """Synchronise a CUDA device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _timing(runs_ms: list[float]) -> Timing:
    low, _, high = statistics.quantiles(runs_ms, n=4)
    return Timing(statistics.median(runs_ms), high - low, tuple(runs_ms))


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[list[int]]:
    """Measure the peak in bytes while the block runs; the list's one entry is final afterwards.

    On CUDA the memory allocated by torch; on a CPU the resident memory of the process, sampled every 5 ms, without
    memory freed before.
    """
    device = torch.device(device)
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    import psutil

    process, done = psutil.Process(), threading.Event()
    give_back_freed_memory()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            done.wait(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss)


class Stopwatch(Mixer):
    """Mixer that adds up the time spent in the mixer it wraps."""

    def __init__(self, mixer: Mixer, device: torch.device | str) -> None:
        self.mixer = mixer
        self.device = device
        self.seconds = 0.0

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        with self._timed():
            self.mixer.prepare(heads, head_dim, device, context)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        with self._timed():
            return self.mixer(q, k, v, x, context)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds += time.perf_counter() - began


@torch.inference_mode()
def attention_shares(
    model: nn.Module,
    images: Tensor,  # [B, S, 3, H, W]
) -> dict[str, float]:
    """Fraction of a forward's time spent in each kind of attention, excluding projections.

    This is the most that token merging can save. The mixers are restored afterwards.

    Returns:
        By kind of attention, a fraction in [0, 1]; and ``total_ms``.
    """
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    device = images.device
    watches: dict[str, list[Stopwatch]] = {}
    for kind, sites in backbone.sites(model).items():
        watches[kind] = [Stopwatch(site.mixer, device) for site in sites]  # type: ignore[arg-type]
    try:
        model(images)  # warm-up
        for kind, sites in backbone.sites(model).items():
            for site, watch in zip(sites, watches[kind], strict=True):
                site.mixer = watch  # type: ignore[assignment]
        synchronize(device)
        began = time.perf_counter()
        model(images)
        synchronize(device)
        total = time.perf_counter() - began
    finally:
        for kind, sites in backbone.sites(model).items():
            for site, watch in zip(sites, watches[kind], strict=True):
                site.mixer = watch.mixer  # type: ignore[assignment]
    shares = {kind: sum(watch.seconds for watch in kinds) / total for kind, kinds in watches.items()}
    return {**shares, "total_ms": 1000 * total}
