"""An accelerated model beside its dense self: which of them is run when, and what becomes of the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

from geoaccel.eval.bench import timing
from geoaccel.eval.bench.speed import Timing
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.source import Source
from geoaccel.linears import QuantizedLinear
from geoaccel.merging.httm import HTTMMixer
from geoaccel.quantization.formats.fp8 import FP8Linear

TIMES = {
    "dense": Timing(100.0, 3.0, (100.0,)),
    "accelerated": Timing(40.0, 2.0, (40.0,)),
    "end_to_end": Timing(70.0, 4.0, (70.0,)),
}
METHODS: dict[str, dict[str, Any]] = {
    "merged": {"merging": {"httm": {"bypass": False}}},
    "quantized": {"quantization": {"fp8": {}}},
    "both": {"merging": {"httm": {"bypass": False}}, "quantization": {"fp8": {}}},
    "dense": {},
}


class Watched:
    """Notes which methods act while something runs; memory is 5 GiB, and 3 where any does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[str] = set()
        self.by_candidate: dict[str, set[str]] = {}
        for kind, method, name in ((HTTMMixer, "__call__", "httm"), (FP8Linear, "forward", "fp8")):
            monkeypatch.setattr(kind, method, self.noting(getattr(kind, method), name))
        monkeypatch.setattr(timing, "compare", self.compare)
        monkeypatch.setattr(timing, "peak_memory", self.peak_memory)

    def noting(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen.add(name)
            return real(*args, **options)

        return call

    def during(self, call: Callable[[], Any]) -> set[str]:
        self.seen = set()
        call()
        return self.seen

    def compare(self, candidates: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Timing]:
        assert options == {"repeats": 7, "warmup": 2, "device": "cpu"}
        for _ in range(2):  # the dense turn of the second round comes after an accelerated one
            self.by_candidate = {name: self.during(call) for name, call in candidates.items()}
        return {name: TIMES[name] for name in candidates}

    @contextmanager
    def peak_memory(self, device: str) -> Iterator[list[int]]:
        self.seen, peak = set(), [0]
        yield peak
        peak[0] = (3 if self.seen else 5) << 30


@pytest.mark.parametrize("what", METHODS)
def test_each_turn_runs_the_model_that_it_is_named_after(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(str(write_checkpoint("vggt", tmp_path)), resize=False, **METHODS[what])
    scene = next(iter(Source("synthetic", frames=3, scenes=1, options={"size": [28, 42]})()))
    watched = Watched(monkeypatch)
    found = timing.measure(job, scene, repeats=7, warmup=2)
    acts = {"merged": {"httm"}, "quantized": {"fp8"}, "both": {"httm", "fp8"}, "dense": set()}[what]
    accelerated = {} if what == "dense" else {"accelerated": acts}
    assert watched.by_candidate == {"dense": set(), "end_to_end": acts, **accelerated}
    assert (found.frames, found.height, found.width) == (3, 28, 42)
    assert (found.dense_latency_ms, found.dense_spread_ms, found.end_to_end_ms) == (100, 3, 70)
    assert found.dense_peak_memory_gib == 5
    if what == "dense":
        assert (found.latency_ms, found.spread_ms, found.speedup, found.peak_memory_gib) == (100, 3, 1, 5)
    else:
        assert (found.latency_ms, found.spread_ms, found.speedup, found.peak_memory_gib) == (40, 2, 2.5, 3)
    cost: Any = job.build().cost  # type: ignore[union-attr]
    expected = cost(3, (28, 42)).limit_share(2.5) if "httm" in acts else None
    assert found.limit_share == expected


def test_no_share_of_a_gain_where_nothing_was_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(write_checkpoint("vggt", tmp_path)), resize=False, merging={"asymmetric": {}})
    scene = next(iter(Source("synthetic", frames=3, scenes=1, options={"size": [28, 42]})()))
    Watched(monkeypatch)
    assert timing.measure(job, scene, repeats=7, warmup=2).limit_share is None  # every key of three frames is kept


def test_one_set_of_weights_serves_both_unless_they_are_quantized(tmp_path: Path) -> None:
    checkpoint = str(write_checkpoint("vggt", tmp_path))
    merged = timing.Pair(Job(checkpoint, merging={"httm": {}}))
    assert merged.use(dense=True) is merged.use(dense=False)
    quantized = timing.Pair(Job(checkpoint, quantization={"fp8": {}}))
    assert not any(isinstance(layer, QuantizedLinear) for layer in quantized.use(dense=True).modules())
    assert any(isinstance(layer, QuantizedLinear) for layer in quantized.use(dense=False).modules())
