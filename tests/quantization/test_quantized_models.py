"""Whole networks with quantized linears, through the public verbs."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from quantized_networks import equal, method  # noqa: F401
from references import NEEDED_KNOBS, Golden
from torch import nn
from upstream_objects import upstream_double

import geoaccel
from geoaccel.linears import quantized_linears
from geoaccel.merging import MERGING
from geoaccel.models.vggt import VGGT
from geoaccel.quantization import FP8, W4A16, Quantization, scope_of
from geoaccel.quantization.swap import float_linears
from geoaccel.testing.rules import run

TAKEN = {
    "vggt": 4 * (2 + 4 + 4 + 4),
    "pi3": 4 * (2 + 6) + 3 * (4 * 2 + 2),
    "pi3x": 4 * (2 + 6) + 3 * (4 + 2),
    "da3": 40,
}
"""By backbone, linear layers that are quantized."""


def float_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ------------------------------------------------------------------------------------------------- which layers


def test_every_linear_is_quantized_but_those_of_the_heads(tiny: nn.Module, method: Quantization) -> None:
    every = float_names(tiny)
    geoaccel.accelerate(tiny, quantization=method)
    left, taken = float_names(tiny), set(quantized_linears(tiny))
    assert left | taken == every
    assert {name for name in every if any(fnmatchcase(name, scope) for scope in scope_of(tiny))} == taken
    prefixes = {name.split(".blocks")[0].split("_blocks")[0].split("decoder.")[0].split(".trunk")[0] for name in taken}
    if isinstance(tiny, VGGT):
        assert prefixes == {"aggregator.patch_embed", "aggregator.frame", "aggregator.global", "camera_head"}
    assert len(taken) == TAKEN[tiny.backbone.name]  # type: ignore[union-attr, index]
    assert all(layer.method == method for layer in quantized_linears(tiny).values())


def test_include_and_exclude(tiny: nn.Module) -> None:
    every = float_names(tiny)
    geoaccel.accelerate(tiny, quantization=FP8(include=("*.fc1", "*.proj"), exclude=("*.1.*",)))
    expected = {name for name in every if name.endswith((".fc1", ".proj")) and ".1." not in name}
    assert set(quantized_linears(tiny)) == expected


def test_two_methods_share_a_network(tiny: nn.Module, golden: Golden) -> None:
    mixed = [W4A16(exclude="*.attn.qkv"), FP8(include="*.attn.qkv")]
    geoaccel.accelerate(tiny, quantization=mixed)
    for name, layer in quantized_linears(tiny).items():
        assert layer.method == mixed[name.endswith("qkv")]
    assert [part.method for part in geoaccel.describe(tiny).quantization] == mixed[::-1]
    assert all(value.isfinite().all() for value in run(tiny, golden["inputs.images"]).values())


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("fp9", "unknown quantization method 'fp9'; known: fp8, w4a16. Did you mean 'fp8'?"),
        (FP8(include="camera_had.*"), r"'camera_had.*' matches no linear layer; .* (camera_|backbone)"),
        (FP8(exclude=("*.qvk",)), r"fp8: '\*.qvk' matches no linear layer; the network has \d+, under "),
        (W4A16(exclude="*"), r"w4a16: include=.* with exclude=\['\*'\] leaves no linear layer"),
        (W4A16(include=()), r"w4a16: include=\[\] with exclude=\[\] leaves no linear layer"),
        (["fp8", "w4a16"], "fp8 and w4a16 both quantize .*qkv; exclude it from one of them"),
    ],
)
def test_bad_choices_are_one_line_and_change_nothing(tiny: nn.Module, quantization: Any, says: str) -> None:
    before = str(geoaccel.describe(tiny))
    with pytest.raises(ValueError, match=says) as caught:
        geoaccel.accelerate(tiny, merging="fastvggt", attention="matmul", quantization=quantization)
    assert "\n" not in str(caught.value)
    assert str(geoaccel.describe(tiny)) == before


@pytest.mark.parametrize("thing", [8, FP8, nn.Linear(1, 1)])
def test_other_things_are_type_errors(tiny: nn.Module, thing: Any) -> None:
    with pytest.raises(TypeError, match="quantization takes a name, a method such as"):
        geoaccel.accelerate(tiny, quantization=thing)


def test_damaged_weights_leave_the_model_as_it_was(tiny: nn.Module, method: Quantization) -> None:
    last = method.select(float_linears(tiny), scope_of(tiny))[-1]
    with torch.no_grad():
        tiny.get_submodule(last).weight[0, 0] = torch.nan
    before = str(geoaccel.describe(tiny))
    with pytest.raises(ValueError, match=f"the weights of {last} contain NaN"):
        geoaccel.accelerate(tiny, attention="matmul", quantization=method)
    assert str(geoaccel.describe(tiny)) == before


# ------------------------------------------------------------------------------------------------- in and out


def test_kept_originals_come_back_bit_for_bit(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    images = golden["inputs.images"]
    before, state = run(tiny, images), copy.deepcopy(tiny.state_dict())
    geoaccel.accelerate(tiny, quantization=method, keep_original=True)
    assert not equal(run(tiny, images), before)
    taken = tuple(f"{name}.weight" for name in quantized_linears(tiny))
    assert taken
    assert not set(taken) & set(tiny.state_dict())
    assert geoaccel.restore(tiny) is tiny
    assert equal(run(tiny, images), before)
    restored = tiny.state_dict()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)
    assert geoaccel.describe(tiny).quantization == ()


def test_kept_originals_follow_a_cast_of_the_network(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    images = golden["inputs.images"].double()
    before = copy.deepcopy(tiny)
    geoaccel.accelerate(tiny, quantization=method, keep_original=True).double().to("cpu")
    geoaccel.accelerate(tiny, quantization=method, keep_original=True)
    assert all(torch.isfinite(value).all() for value in run(tiny, images).values())
    expected = geoaccel.accelerate(copy.deepcopy(before).double(), quantization=method)
    assert equal(run(tiny, images), run(expected, images))
    geoaccel.restore(tiny)
    assert {tensor.dtype for tensor in tiny.parameters()} == {torch.float64}
    assert equal(run(tiny, images), run(before.double(), images))


def test_a_cast_leaves_the_float_layers_of_another_holder_alone(tiny: nn.Module, method: Quantization) -> None:
    taken = method.select(float_linears(tiny), scope_of(tiny))
    held = {name: tiny.get_submodule(name).weight for name in taken if name.endswith("qkv")}
    assert held
    geoaccel.accelerate(tiny, quantization=method, keep_original=True)
    geoaccel.restore(tiny.bfloat16())
    assert {parameter.dtype for parameter in held.values()} == {torch.float32}


def test_nothing_is_kept_of_a_network_without_floats(tiny: nn.Module, method: Quantization) -> None:
    geoaccel.accelerate(tiny, quantization=method)
    geoaccel.accelerate(tiny, merging="httm", keep_original=True)  # nothing to quantize, nothing to keep
    assert geoaccel.describe(tiny).quantization


def test_an_earlier_call_is_replaced_where_the_originals_are_kept(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    dense, fresh = run(tiny, images), copy.deepcopy(tiny)
    geoaccel.accelerate(tiny, quantization="fp8", keep_original=True)
    geoaccel.accelerate(tiny, quantization=W4A16(include="*.qkv"), keep_original=True)
    assert equal(run(tiny, images), run(geoaccel.accelerate(fresh, quantization=W4A16(include="*.qkv")), images))
    geoaccel.accelerate(tiny)
    assert equal(run(tiny, images), dense)
    geoaccel.accelerate(geoaccel.accelerate(tiny, quantization="fp8", keep_original=True), quantization="w4a16")
    assert not any(layer.original for layer in quantized_linears(tiny).values())


def test_without_the_originals_there_is_no_way_back(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, quantization="fp8", attention="matmul")
    quantized, before = run(tiny, images), str(geoaccel.describe(tiny))
    assert "matmul" in before
    for again in (
        lambda: geoaccel.restore(tiny),
        lambda: geoaccel.accelerate(tiny, quantization="w4a16"),
        lambda: geoaccel.accelerate(tiny, quantization=FP8(activations=False)),
        lambda: geoaccel.accelerate(tiny, quantization="fp8", keep_original=True),
    ):
        with pytest.raises(ValueError, match=r"not kept \(fp8\); load the float .* keep_original=True") as caught:
            again()
        assert "\n" not in str(caught.value)
        assert str(geoaccel.describe(tiny)) == before
    geoaccel.accelerate(tiny, quantization="fp8", attention="matmul")  # what it is already
    assert equal(run(tiny, images), quantized)
    geoaccel.accelerate(tiny)  # takes out the kernel alone
    after = str(geoaccel.describe(tiny))
    assert "matmul" not in after
    assert before.splitlines()[-1] == after.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(MERGING))
def test_commutes_with_merging(tiny: nn.Module, golden: Golden, method: Quantization, name: str) -> None:
    merging = MERGING[name](bypass=False, **NEEDED_KNOBS.get(name, {}))  # type: ignore[arg-type]
    images = golden["inputs.images"]
    together = run(geoaccel.accelerate(copy.deepcopy(tiny), merging=merging, quantization=method), images)
    quantized_first = geoaccel.accelerate(copy.deepcopy(tiny), quantization=method)
    quantized_first = run(geoaccel.accelerate(quantized_first, merging=merging), images)
    merged_first = geoaccel.accelerate(copy.deepcopy(tiny), merging=merging)
    merged_first = run(geoaccel.accelerate(merged_first, merging=merging, quantization=method), images)
    alone = run(geoaccel.accelerate(copy.deepcopy(tiny), quantization=method), images)
    assert equal(together, quantized_first)
    assert equal(together, merged_first)
    assert not equal(together, alone)


def test_upstream_objects(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    expected = run(geoaccel.accelerate(copy.deepcopy(tiny), quantization=method), golden["inputs.images"])
    theirs = upstream_double(tiny)
    theirs_before = run(tiny, golden["inputs.images"])
    ours = geoaccel.accelerate(geoaccel.adopt(theirs), quantization=method)
    assert equal(run(ours, golden["inputs.images"]), expected)
    assert equal(run(theirs, golden["inputs.images"]), theirs_before)


def test_copies_keep_their_own_originals(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    before = run(tiny, golden["inputs.images"])
    copied = copy.deepcopy(geoaccel.accelerate(tiny, quantization=method, keep_original=True))
    geoaccel.restore(tiny)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    assert equal(run(geoaccel.restore(copied), golden["inputs.images"]), before)
