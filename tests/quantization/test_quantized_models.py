"""Whole networks with quantized linears, through the public verbs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from references import NEEDED_KNOBS, Golden, relative_error
from torch import Tensor, nn
from upstream_objects import upstream_double

import geoaccel
from geoaccel.linears import QuantizedLinear, quantized_linears
from geoaccel.merging import MERGING
from geoaccel.models.vggt import VGGT
from geoaccel.precision import cast
from geoaccel.quantization import FP8, W4A16, Quantization, assert_outputs_differ, assert_quantized, scope_of
from geoaccel.quantization.formats import reference
from geoaccel.quantization.swap import float_linears
from geoaccel.testing.duplicates import duplicate

# Tiny networks are 32 wide and 128 in the middle of an MLP: groups of every kind.
METHODS = [FP8(), W4A16(group_size=48)]

FLOAT = {"depth_encoder", "pose_inject_blk", "metric_decoder", "head", "cam_enc", "cam_dec"}
"""Children that stay in float besides heads: what only given depths and poses use, and what makes numbers."""

TAKEN = {
    "vggt": 4 * (2 + 4 + 4 + 4),
    "pi3": 4 * (2 + 6) + 3 * (4 * 2 + 2),
    "pi3x": 4 * (2 + 6) + 3 * (4 + 2),
    "da3": 40,
}
"""By backbone, linear layers that are quantized."""


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Quantization:
    return request.param


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def photographs(frames: int, size: tuple[int, int] = (42, 56)) -> Tensor:
    return torch.rand(1, frames, 3, *size, generator=torch.Generator().manual_seed(frames))


def float_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ------------------------------------------------------------------------------------------------- which layers


def test_every_linear_is_quantized_but_those_of_the_heads(tiny: nn.Module, method: Quantization) -> None:
    every = float_names(tiny)
    geoaccel.accelerate(tiny, quantization=method)
    left, taken = float_names(tiny), set(quantized_linears(tiny))
    assert left | taken == every
    heads = tuple(f"{name}." for name, _ in tiny.named_children() if name.endswith("_head") or name in FLOAT)
    assert {name for name in every if not f"{name}.".startswith(heads) or "head.trunk." in name} == taken
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
        (
            FP8(include="camera_had.*"),
            r"'camera_had.*' matches no linear layer; .* (camera_|backbone)",
        ),
        (FP8(exclude=("*.qvk",)), r"fp8: '\*.qvk' matches no linear layer; the network has \d+, under "),
        (W4A16(exclude="*"), r"w4a16: include=.* with exclude=\['\*'\] leaves no linear layer"),
        (W4A16(include=()), r"w4a16: include=\[\] with exclude=\[\] leaves no linear layer"),
        (["fp8", "w4a16"], "fp8 and w4a16 both quantize .*qkv; keep one of them off it with exclude"),
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
    with pytest.raises(ValueError, match=f"the weights of {last} hold NaN"):
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
    before = duplicate(tiny)
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
    dense, fresh = run(tiny, images), duplicate(tiny)
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
        with pytest.raises(ValueError, match=r"gone \(fp8\); load the model again, .* keep_original=True") as caught:
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
    together = run(geoaccel.accelerate(duplicate(tiny), merging=merging, quantization=method), images)
    quantized_first = geoaccel.accelerate(duplicate(tiny), quantization=method)
    quantized_first = run(geoaccel.accelerate(quantized_first, merging=merging), images)
    merged_first = geoaccel.accelerate(duplicate(tiny), merging=merging)
    merged_first = run(geoaccel.accelerate(merged_first, merging=merging, quantization=method), images)
    alone = run(geoaccel.accelerate(duplicate(tiny), quantization=method), images)
    assert equal(together, quantized_first)
    assert equal(together, merged_first)
    assert not equal(together, alone)


def test_upstream_objects(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    expected = run(geoaccel.accelerate(duplicate(tiny), quantization=method), golden["inputs.images"])
    theirs = upstream_double(tiny)
    theirs_before = run(tiny, golden["inputs.images"])
    ours = geoaccel.accelerate(geoaccel.adopt(theirs), quantization=method)
    assert equal(run(ours, golden["inputs.images"]), expected)
    assert equal(run(theirs, golden["inputs.images"]), theirs_before)


def test_copies_keep_their_own_originals(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    before = run(tiny, golden["inputs.images"])
    twin = copy.deepcopy(geoaccel.accelerate(tiny, quantization=method, keep_original=True))
    geoaccel.restore(tiny)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    assert equal(run(geoaccel.restore(twin), golden["inputs.images"]), before)


# ------------------------------------------------------------------------------------------------- what it does


def test_every_frame_is_kept(tiny: nn.Module, method: Quantization) -> None:
    images = {frames: photographs(frames) for frames in (1, 2, 3, 7, 9)}
    dense = {frames: run(tiny, batch) for frames, batch in images.items()}
    geoaccel.accelerate(tiny, quantization=method)
    for frames, expected in dense.items():
        quantized = run(tiny, images[frames])
        for key, value in expected.items():
            assert quantized[key].shape == value.shape, key
            assert value.ndim == 1 or value.shape[1] == frames  # one number a scene, or one a frame
            assert quantized[key].isfinite().all(), key


@pytest.mark.parametrize(("method", "bound"), [(FP8(), 0.3), (FP8(activations=False), 0.2), (W4A16(), 0.4)], ids=str)
def test_predictions_stay_near(tiny: nn.Module, golden: Golden, method: Quantization, bound: float) -> None:
    """Random networks amplify: their outputs are off by several times as much as their layers."""
    images = golden["inputs.images"]
    dense = run(tiny, images)
    quantized = run(geoaccel.accelerate(tiny, quantization=method), images)
    for key in {"depth", "world_points", "local_points", "conf"} & dense.keys():
        assert 0 < relative_error(quantized[key], dense[key]) < bound, key


class Decoded(nn.Linear):
    """A float layer with the numbers that the codes of a quantized one stand for."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.rounds = getattr(layer.method, "activations", False)
        self.weight = nn.Parameter(layer.dequantize())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds:
            rows = x.reshape(-1, self.in_features)
            x = reference.dequantize_rows(*reference.quantize_rows(rows)).view(x.shape).to(x.dtype)
        return super().forward(x)


def test_a_narrow_network_is_that_of_the_decoded_weights(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    """Bit for bit, on any processor: both multiply the same numbers in the same shapes.

    A bound on the distance from the wide network would know one processor: rounding to bfloat16 moves activations
    across the steps of e4m3, and every layer amplifies that.
    """
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, quantization=method)
    wide, expected = run(tiny, images), duplicate(tiny)
    for name, layer in quantized_linears(expected).items():
        expected.set_submodule(name, Decoded(layer))
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items() if "weight_" in name}
    narrow = run(cast(tiny, torch.bfloat16), images)
    after = tiny.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert equal(narrow, run(cast(expected, torch.bfloat16), images))
    assert {key: value.dtype for key, value in narrow.items()} == {key: value.dtype for key, value in wide.items()}
    assert not equal(narrow, wide)


def test_an_infinite_photograph_is_one_clear_line(tiny: nn.Module) -> None:
    images = photographs(2)
    images[0, 1, 0, 3, 3] = torch.inf
    geoaccel.accelerate(tiny, quantization="fp8")
    with pytest.raises(ValueError, match="photograph 1 of scene 0 holds NaN or infinite values; leave it out"):
        run(tiny, images)


def test_description(tiny: nn.Module, method: Quantization) -> None:
    before = geoaccel.describe(tiny)
    after = geoaccel.describe(geoaccel.accelerate(tiny, quantization=method, keep_original=True))
    assert after.parameters == before.parameters == sum(after.dtypes.values())
    layers = quantized_linears(tiny)
    (part,) = after.quantization
    assert (part.method, part.linears, part.kept) == (method, len(layers), True)
    assert part.weights == sum(layer.in_features * layer.out_features for layer in layers.values())
    assert part.weights == after.dtypes[method.name]
    state = tiny.state_dict()
    assert part.stored_bytes == sum(t.nbytes for name, t in state.items() if ".weight_" in name)
    text = str(after)
    assert f"quantization of {len(layers)} linear layers: {method}; {part.weights:,} weights in " in text
    assert "the float weights are kept beside them" in text
    assert sum(part.runs_as.values()) == len(layers)
    if method == FP8():
        assert list(part.runs_as) == ["decoded for a dense product (no FP8 product on cpu)"] or any(
            "no multiple of 16" in how for how in part.runs_as
        )


def test_no_global_state_is_touched(tiny: nn.Module, golden: Golden, method: Quantization) -> None:
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    run(geoaccel.accelerate(tiny, quantization=method), golden["inputs.images"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]


def test_names() -> None:
    assert {"fp8", "w4a16"} <= set(geoaccel.list_quantization())


# ------------------------------------------------------------------------------------------------- the guard


def test_a_float_model_does_not_pass_for_a_quantized_one(tiny: nn.Module, golden: Golden) -> None:
    dense = tiny(golden["inputs.images"])
    with pytest.raises(RuntimeError, match="the evaluated model has no quantized layer"):
        assert_quantized(tiny)
    geoaccel.accelerate(tiny, quantization="fp8", keep_original=True)
    assert_quantized(tiny)
    assert_quantized(tiny, "fp8", FP8())
    for wrong in ("w4a16", FP8(activations=False)):
        with pytest.raises(RuntimeError, match="the evaluated model has layers of fp8"):
            assert_quantized(tiny, "fp8", wrong)
    assert_outputs_differ(tiny(golden["inputs.images"]), dense)
    geoaccel.restore(tiny)
    with pytest.raises(RuntimeError, match="equal those of the float model bit for bit"):
        assert_outputs_differ(tiny(golden["inputs.images"]), dense)
    with pytest.raises(RuntimeError, match="nothing that could be compared"):
        assert_outputs_differ({"images": golden["inputs.images"]}, dense)


def test_one_prediction_that_differs_is_enough() -> None:
    dense = {"depth": torch.ones(3), "pose": torch.ones(2)}
    assert_outputs_differ({"depth": torch.ones(3), "pose": torch.zeros(2)}, dense)


def test_layers_are_found_wherever_they_are() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    from geoaccel.quantization import quantize

    quantize(net, FP8(include="*"))
    assert isinstance(net[0][0], QuantizedLinear)
    assert isinstance(net[1], QuantizedLinear)
