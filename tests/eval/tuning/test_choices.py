"""What a choice costs, against what it really computes."""

from __future__ import annotations

import pytest
from merging_scenes import Scene
from torch import nn

from geoaccel.cost import PRODUCTS
from geoaccel.eval.tuning.choices import CHOICES, DENSE, acting, attention_work, costs
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.bypass import Work
from geoaccel.merging.fastvggt import FastVGGT


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
    cost = attention_work(method, scene.layout, scene.heads, scene.head_dim, "cpu")
    counted = Work(effect.tokens, effect.queries, effect.keys, 0.0, scene.heads, scene.head_dim).merged("cpu")
    more = 0.0
    if name == "httm":  # what it compares is not in the effect: the rule of the mixer itself has it
        tokens, dense = effect.tokens, attention_work(None, scene.layout, scene.heads, scene.head_dim, "cpu")
        why = CHOICES["httm"].mixer("sdpa").why_dense(scene.layout, scene.q)  # type: ignore[union-attr]
        assert f"merging {tokens:,} tokens would take {cost / dense:.1f} x" in why
        more = cost - counted
        assert more > 0
    assert cost == pytest.approx(counted + more, rel=0.03)


def test_a_forward_is_the_rest_and_its_layers(tiny: nn.Module) -> None:
    found = costs(tiny, 3, (28, 42))
    depth = len(found.layers)
    cost = tiny.cost(3, (28, 42))  # type: ignore[operator]
    assert found.rest == pytest.approx((cost.total - cost.parts[PRODUCTS]) / 2)
    assert found.dense == found.forward([DENSE] * depth)
    one = found.forward(["frame-only", *[DENSE] * (depth - 1)])
    assert one - found.dense == pytest.approx(found.layers[0]["frame-only"] - found.layers[0][DENSE])
    assert found.least <= one


def test_acting_methods_are_never_bypassed() -> None:
    assert acting(Asymmetric(stride=4)) == Asymmetric(stride=4, bypass=False)
    assert acting(None) is None
    assert acting(CHOICES["frame-only"]) == CHOICES["frame-only"]


def test_other_methods_have_no_cost_here() -> None:
    with pytest.raises(ValueError, match="fastvggt has no cost here"):
        attention_work(FastVGGT(), Scene(2, (2, 2)).layout, 1, 8, "cpu")
