"""Fidelity of layers: tokens behind each block of two models, the same forward at the same block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geoaccel
from geoaccel.eval.metrics.fidelity import capture_layers, layer_fidelity, token_cosine
from geoaccel.merging.alike import Alike
from geoaccel.merging.fastvggt import FastVGGT
from geoaccel.models.layers.block import Block


def images_of(size: tuple[int, int] = (56, 70)) -> Tensor:  # two scenes of three
    return torch.rand(2, 3, 3, *size, generator=torch.Generator().manual_seed(0))


def alike(**knobs: Any) -> Alike:
    return Alike(tap=0, bypass=False, **knobs)


def frame_and_global(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the network itself keeps of its last layers, in the order of their blocks."""
    network: Any = model
    pairs = network.aggregator(images)[0] if hasattr(model, "aggregator") else [network.features(images)]
    return [half for pair in pairs for half in pair.chunk(2, dim=-1)]


METHODS = [None, FastVGGT(bypass=False), alike(), alike(variant="direct")]


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS, ids=["dense", "fastvggt", "alike", "alike-direct"])
def test_captured_is_what_the_network_keeps(tiny: nn.Module, method: Any) -> None:
    """Bit for bit, and merged tokens in every place that they stand for."""
    model = geoaccel.accelerate(tiny, merging=method)
    with capture_layers(model) as layers:
        model(images_of())
    kept = frame_and_global(model, images_of())
    assert len(kept) >= 2
    for layer, expected in zip(layers[-len(kept) :], kept, strict=True):
        assert torch.equal(layer.tokens, expected)
    sites = model.backbone.sites(model)  # type: ignore[union-attr,operator]
    encoder = [("encoder", i) for i in range(len(sites["encoder"]))]
    rest = [(kind, i) for i in range(len(sites["global"])) for kind in ("frame", "global")]
    assert [(layer.kind, layer.index) for layer in layers] == encoder + rest
    assert {layer.tokens.shape[:2] for layer in layers} == {(2, 3)}


@torch.inference_mode()
def test_captured_is_what_every_block_answers(tiny: nn.Module) -> None:
    answers: list[Tensor] = []
    names = ("aggregator", "encoder", "decoder.")
    for name, block in tiny.named_modules():
        if isinstance(block, Block) and name.startswith(names):
            block.register_forward_hook(lambda module, arguments, answer: answers.append(answer))
    with capture_layers(tiny) as layers:
        tiny(images_of())
    assert len(answers) == len(layers)
    for layer, answer in zip(layers, answers, strict=True):
        assert torch.equal(layer.tokens.flatten(), answer.flatten())


@torch.inference_mode()
def test_layers_of_one_model_are_exactly_equal(tiny: nn.Module) -> None:
    with capture_layers(tiny) as dense:
        tiny(images_of())
    geoaccel.restore(geoaccel.accelerate(tiny, merging=alike()))
    with layer_fidelity(tiny, dense) as rows:
        tiny(images_of())
    assert len(rows) == len(dense)
    for row in rows:
        assert row["fidelity_cosine_mean"] == row["fidelity_cosine_min"] == 1.0


@torch.inference_mode()
@pytest.mark.parametrize(
    ("method", "equal"),
    [(FastVGGT(bypass=False), "encoder encoder frame"), (alike(), "encoder"), (alike(variant="direct"), "encoder")],
    ids=["fastvggt", "alike", "alike-direct"],
)
def test_layers_differ_from_where_a_method_acts(tiny: nn.Module, method: Any, equal: str) -> None:
    """The very same object, accelerated in place."""
    with capture_layers(tiny) as dense:
        tiny(images_of())
    geoaccel.accelerate(tiny, merging=method)
    with layer_fidelity(tiny, dense) as rows:
        tiny(images_of())
    untouched = len(equal.split())
    assert [row["kind"] for row in rows[:untouched]] == equal.split()
    assert {row["fidelity_cosine_min"] for row in rows[:untouched]} == {1.0}
    for row in rows[untouched:]:
        assert row["fidelity_cosine_min"] < row["fidelity_cosine_mean"] < 1


@torch.inference_mode()
def test_one_token_that_turned_round(tiny: nn.Module) -> None:
    with capture_layers(tiny) as dense:
        tiny(images_of())
    dense[3].tokens[1, 2, 4] *= -2
    with layer_fidelity(tiny, dense) as rows:
        tiny(images_of())
    assert rows[3]["fidelity_cosine_min"] == pytest.approx(-1)
    assert rows[3]["fidelity_cosine_mean"] == pytest.approx(1 - 2 / dense[3].tokens[..., 0].numel())
    assert [i for i, row in enumerate(rows) if row["fidelity_cosine_min"] < 1] == [3]
    assert [(row["kind"], row["index"]) for row in rows] == [(layer.kind, layer.index) for layer in dense]


@torch.inference_mode()
def test_other_forwards_are_refused_and_nothing_stays_behind(tiny: nn.Module) -> None:
    images = images_of()
    expected = frame_and_global(tiny, images)[-1]
    with capture_layers(tiny) as dense:
        tiny(images)
    with pytest.raises(ValueError, match="run both on the same photographs"), layer_fidelity(tiny, dense):
        tiny(images_of((70, 56))[:, :2])
    with pytest.raises(ValueError, match="is not the block captured at this position"), layer_fidelity(tiny, dense[1:]):
        tiny(images)
    with layer_fidelity(tiny, dense):
        tiny(images)
        with pytest.raises(ValueError, match="is not the block captured at this position"):
            tiny(images)
    with pytest.raises(ValueError, match=f"0 blocks ran where {len(dense)} were captured"), layer_fidelity(tiny, dense):
        pass
    for part in tiny.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert torch.equal(frame_and_global(tiny, images)[-1], expected)


def test_cosine_of_tokens() -> None:
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0], [1e-30, 0], [float("nan"), 1]])
    b = torch.tensor([[3.0, 3], [-2, 0], [0, 5], [0, 0], [1, 0], [1e30, 0], [float("nan"), 1]])
    found = token_cosine(a, b)
    assert found[:-1].tolist() == pytest.approx([math.sqrt(0.5), -1, 0, 1, 0, 1])
    assert found[-1].isnan()


@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_cosine_of_equal_tokens_is_exactly_one(seed: int, dtype: torch.dtype) -> None:
    tokens = torch.randn(50, 33, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert set(token_cosine(tokens, tokens.clone()).tolist()) == {1.0}
