"""What a choice costs, against what it really computes."""

from __future__ import annotations

import pytest
import torch
from merging_scenes import Scene
from torch import nn

from geoaccel.cost import Trunk
from geoaccel.eval.tuning.choices import CHOICES, DENSE, acting, attention_seconds, costs
from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.calibration import rates_for
from geoaccel.merging.gain import Setting, seconds
from geoaccel.merging.rates import Kind

SETTING = Setting(Trunk(384, 14, 4, 4, 4, encoder_special=1, special=5))


@pytest.mark.parametrize("name", [name for name in CHOICES if name != DENSE])
def test_costs_count_the_queries_and_keys_that_are_left(name: str) -> None:
    scene = Scene(6, (8, 8))
    method = acting(CHOICES[name])
    assert method is not None
    mixer = method.mixer("sdpa")
    scene.through(mixer)
    effect = mixer.effect
    assert effect is not None
    assert effect.bypassed is None
    kind = Kind(torch.device("cpu"), torch.float32, scene.heads * scene.head_dim, scene.head_dim)
    rates = rates_for(kind)
    mixer.setting = SETTING
    work = mixer.work(scene.layout, scene.q)  # type: ignore[attr-defined]
    assert (work.queries, work.keys) == pytest.approx((effect.queries, effect.keys), rel=0.02)
    products = scene.heads * work.queries * work.keys * rates.attend
    alone = attention_seconds(method, scene.layout, kind, SETTING)
    assert alone == pytest.approx(products + work.extra.seconds(rates))


def test_keys_that_nobody_makes_cost_nothing_on_a_cpu() -> None:
    layout, kind = TokenLayout(1, 32, (16, 16), 5), Kind(torch.device("cpu"), torch.float32, 384, 64)
    found, rates = attention_seconds(CHOICES["stride 8"], layout, kind, SETTING), rates_for(kind)
    keys, tokens = 5 * 32 + 256 + 31 * 32, 32 * 261
    attended = 6 * tokens * keys * rates.attend
    spared = 2 * 384**2 * (tokens - keys) * rates.linear
    assert attended - spared < found < attended - 0.4 * spared  # gathering them takes some of it


def test_a_forward_is_the_rest_and_its_layers(tiny: nn.Module) -> None:
    found = costs(tiny, 3, (28, 42))
    depth = len(found.layers)
    cost = tiny.cost(3, (28, 42))  # type: ignore[operator]
    weight = tiny.get_submodule(tiny.backbone.patch_embedding).weight  # type: ignore[union-attr, arg-type]
    site = tiny.backbone.sites(tiny)["global"][0]  # type: ignore[union-attr, operator]
    kind = Kind(weight.device, weight.dtype, site.num_heads * site.head_dim, site.head_dim)  # type: ignore[arg-type]
    assert found.dense == pytest.approx(seconds(cost, rates_for(kind), site.head_dim))
    assert found.dense == found.forward([DENSE] * depth)
    one = found.forward(["frame-only", *[DENSE] * (depth - 1)])
    assert one - found.dense == pytest.approx(found.layers[0]["frame-only"] - found.layers[0][DENSE])
    assert found.least <= one


def test_acting_methods_are_never_bypassed() -> None:
    assert acting(Asymmetric(stride=4, min_gain=1)) == Asymmetric(stride=4, bypass=False)
    assert acting(None) is None
    assert acting(CHOICES["frame-only"]) == CHOICES["frame-only"]
    assert CHOICES["stride 4"] == Asymmetric(stride=4, min_gain=1)
