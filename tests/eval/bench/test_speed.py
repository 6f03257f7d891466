"""Timings of things whose time is known."""

from __future__ import annotations

import mmap
import platform
import time

import psutil
import pytest
import torch
from references import Golden
from torch import nn

import geoaccel
from geoaccel.eval.bench.speed import attention_shares, compare, peak_memory
from geoaccel.merging.litevggt import LiteVGGT


def test_candidates_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    def candidate(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            # One slow outlier each: a mean would be off by far.
            time.sleep(0.2 if order.count(name) == 3 else seconds)

        return call

    timings = compare({"a": candidate("a", 0.004), "b": candidate("b", 0.02)}, repeats=5, warmup=1)
    assert order == ["a", "b"] * 6
    assert len(timings["a"].runs_ms) == 5
    assert 4 <= timings["a"].latency_ms < 20
    assert 20 <= timings["b"].latency_ms < 60
    with pytest.raises(ValueError, match="repeats=3"):
        compare({}, repeats=3)


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 3), (0.15, 4), (60.0, 5)])
def test_no_turn_begins_after_the_time_but_three_do(seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.025

    timings = compare({"a": call, "b": call}, warmup=0, seconds=seconds)
    assert [len(timing.runs_ms) for timing in timings.values()] == [runs, runs]
    assert timings["b"].latency_ms == pytest.approx(25)


def test_peak_memory_sees_what_is_freed_again() -> None:
    with peak_memory("cpu") as small:
        time.sleep(0.02)
    with peak_memory("cpu") as large:
        block = mmap.mmap(-1, 400_000_000)  # pages that the process did not have: malloc may have kept freed ones
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        time.sleep(0.03)
        block.close()
    assert 0.35e9 < large[0] - small[0] < 0.6e9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_peak_memory_is_without_what_was_freed_before() -> None:
    size = 100_000  # below what glibc maps by itself
    pieces = [torch.ones(size // 4) for _ in range(2000)]
    del pieces[:-1:2]
    held = psutil.Process().memory_info().rss
    with peak_memory("cpu") as peak:
        pass
    assert peak[0] < held - 500 * size


def test_attention_shares_put_the_mixers_back(tiny: nn.Module, golden: Golden) -> None:
    before = [site.mixer for sites in tiny.backbone.sites(tiny).values() for site in sites]
    shares = attention_shares(tiny, golden["inputs.images"])
    assert [site.mixer for sites in tiny.backbone.sites(tiny).values() for site in sites] == before
    assert set(shares) == {"encoder", "frame", "global", "total_ms"}
    assert all(0 < shares[kind] < 1 for kind in ("encoder", "frame", "global"))
    assert sum(shares[kind] for kind in ("encoder", "frame", "global")) < 1


def test_attention_shares_of_a_method_that_looks_at_the_photographs(tiny: nn.Module, golden: Golden) -> None:
    """It does so before the first block, through the stopwatch."""
    geoaccel.accelerate(tiny, merging=LiteVGGT(bypass=False))
    assert 0 < attention_shares(tiny, golden["inputs.images"])["global"] < 1
    (action,) = geoaccel.describe(tiny).merging
    assert action.effective_ratio > 0
