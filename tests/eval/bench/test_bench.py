"""Settings of ``geoaccel bench``: what is checked before anything is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import geoaccel
from geoaccel.eval.bench import bench as module
from geoaccel.eval.bench.bench import DENSE, Bench, frame_size, off
from geoaccel.eval.bench.speed import Timing
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.run.token_effects import effective_ratio
from geoaccel.merging.fastvggt import FastVGGT
from geoaccel.slots import filled_slots


def bench(*overrides: str) -> Bench:
    return Bench.from_settings(compose_settings("bench", ["device=cpu", *overrides]))


def test_one_value_is_a_list_of_it() -> None:
    found = bench("methods=httm", "frames=8", "size=224", "heads=depth")
    assert list(found.methods) == ["httm"]
    assert not found.all_methods
    assert (found.frames, found.size, found.heads) == ((8,), (224, 224), ("depth",))
    assert found == bench("methods=[httm]", "frames=[8]", "size=[224,224]", "heads=[depth]")
    assert bench("size=[224,280]").size == (224, 280)
    assert bench("size=null").size is None
    assert frame_size({"size": [28]}) == (28, 28)


def test_knobs_of_single_methods() -> None:
    """As ``configs/bench.yaml`` says."""
    found = bench("methods=[httm,fastvggt]", "knobs.httm.anchor=false", "ratio=0.5")
    assert found.methods == {"httm": {"anchor": False, "ratio": 0.5}, "fastvggt": {"ratio": 0.5}}
    assert bench("knobs.httm.query_keep=0.4").methods["httm"] == {"query_keep": 0.4}
    assert bench("knobs={httm: {query_keep: 0.4}}").methods["httm"] == {"query_keep": 0.4}
    assert all(not knobs for knobs in bench().methods.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=htttm", "unknown merging method 'htttm'.*Did you mean 'httm'"),
        ("frames=0", r"frames=\[0\]: give a list of positive numbers"),
        ("frames=few", r"frames=\['few'\]: give a list of positive numbers"),
        ("frames=true", "give a list of positive numbers"),
        ("size=wide", r"size=wide: give height and width, or one number for both: size=\[224,280\]"),
        ("size=[224,224,3]", "give height and width"),
        ("size=[]", "give height and width"),
        ("size=224.5", "give height and width"),
        ("repeats=many", "repeats=many: give at least 5"),
        ("knobs=3", "knobs=3: give knobs of methods by name, such as knobs.httm.query_keep=0.4"),
        ("knobs.httm=3", "give knobs of methods by name"),
        ("knobs.htttm.query_keep=0.4", "unknown merging method 'htttm'.*Did you mean 'httm'"),
        ("knobs.httm.query_kep=0.4", "unknown knob of httm 'query_kep'.*Did you mean 'query_keep'"),
        ("knobs.httm.query_keep=7", r"httm: query_keep=7 is not in"),
        ("knobs.fastvggt.ratio=0.5", r"knobs.fastvggt and methods=\[httm\]: add fastvggt to methods"),
    ],
)
def test_wrong_settings_are_one_line(override: str, message: str) -> None:
    methods = ["methods=httm"] if override.startswith("knobs.fastvggt") else []
    with pytest.raises(ValueError, match=message) as caught:
        bench(*methods, override)
    assert "\n" not in str(caught.value)


def test_a_prediction_that_is_off_is_said() -> None:
    assert off("httm", 64, 2.0, 1.8) is None
    assert off("none", 64, None, 1.0) is None
    assert off("httm", 64, 2.0, 1.7) == "httm at 64 frames: 2.00x was predicted, 1.70x measured"
    assert off("httm", 8, 1.0, 1.3) == "httm at 8 frames: 1.00x was predicted, 1.30x measured"


def test_rows_compare_with_the_dense_model(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(calls: Any, **_: Any) -> dict[str, Timing]:
        return {name: Timing(ms, 0.0, ()) for name, ms in zip(calls, (10.0, 4.0), strict=True)}

    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(Bench, "photographs", lambda _, count, size: torch.rand(1, count, 3, *size))
    slots = {DENSE: filled_slots(tiny)}
    slots["fastvggt"] = filled_slots(geoaccel.accelerate(tiny, merging=FastVGGT(bypass=False)))
    dense, fast = bench("methods=fastvggt", "heads=camera").measure(tiny, slots, 2, (28, 42), "")
    assert (dense.merging, dense.latency_ms, dense.speedup) == (DENSE, 10, 1)
    assert (fast.merging, fast.latency_ms, fast.dense_latency_ms, fast.speedup) == ("fastvggt", 4, 10, 2.5)
    assert effective_ratio(tiny) == fast.effective_ratio
    assert fast.limit_share is not None
    slots["fastvggt"] = filled_slots(geoaccel.accelerate(tiny, merging=FastVGGT(ratio=0)))
    _, idle = bench("methods=fastvggt", "heads=camera").measure(tiny, slots, 2, (28, 42), "")
    assert idle.limit_share is None
    # Means over the layers, so that what is removed is that of one of them.
    assert fast.scores["query_tokens"] < fast.scores["tokens"]
    assert fast.effective_ratio == pytest.approx(1 - fast.scores["query_tokens"] / fast.scores["tokens"])
    assert fast.scores["effective_key_ratio"] == pytest.approx(1 - fast.scores["key_tokens"] / fast.scores["tokens"])
