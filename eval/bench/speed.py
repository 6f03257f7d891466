"""Time and memory, measured so that the numbers can be compared.

Everything that is compared runs in one process on the same weights, dtype, kernel and heads; the candidates take turns,
so that a machine that slows down slows all of them; what is reported is the median of at least five runs after a
warm-up (three, where a caller is short of time and says how many there were). Ratios travel between machines, seconds
do not.
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
"""Runs of each candidate, even where time is short."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one candidate.

    Attributes:
        latency_ms: Median.
        spread_ms: Difference of the quartiles; a speedup smaller than this says nothing.
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
    """Time candidates in turns.

    Args:
        candidates: Name to a call without arguments.
        repeats: Runs of each that count, at least five.
        warmup: Runs of each before that.
        seconds: After so many no turn begins, if each candidate has three runs; for what a person waits for.
        device: Where they run; a CUDA device is waited for.

    Raises:
        ValueError: For fewer than five repeats.
    """
    if repeats < MIN_REPEATS:
        raise UserError(f"repeats={repeats}: a median of fewer than {MIN_REPEATS} runs says little")
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
    """Wait until a CUDA device has done what it was asked."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _timing(runs_ms: list[float]) -> Timing:
    low, _, high = statistics.quantiles(runs_ms, n=4)
    return Timing(statistics.median(runs_ms), high - low, tuple(runs_ms))


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[list[int]]:
    """Measure the peak in bytes while the block runs; the list's one entry is final afterwards.

    On CUDA what torch allocated; on a CPU the resident memory of the process, looked at every 5 ms, without what it
    had freed before.
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
    """Mixer that adds up the time spent in the mixer it stands for."""

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
    """Share of a forward's time that each kind of attention takes, projections not included.

    What token merging can save at most. The mixers are put back as they were.

    Returns:
        Kind of attention to a share in [0, 1], and ``total_ms``.
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
