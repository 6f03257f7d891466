"""Outputs of networks with quantized linears: how near they are, what is reported, and the guard."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_networks import equal, method  # noqa: F401
from references import Golden, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.linears import QuantizedLinear, quantized_linears
from geoaccel.precision import cast
from geoaccel.quantization import FP8, W4A16, Quantization, assert_outputs_differ, assert_quantized
from geoaccel.quantization.formats import reference
from geoaccel.testing.rules import run


def random_images(frames: int, size: tuple[int, int] = (42, 56)) -> Tensor:
    return torch.rand(1, frames, 3, *size, generator=torch.Generator().manual_seed(frames))


def test_every_frame_is_kept(tiny: nn.Module, method: Quantization) -> None:
    images = {frames: random_images(frames) for frames in (1, 2, 3, 7, 9)}
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
    wide, expected = run(tiny, images), copy.deepcopy(tiny)
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


def test_an_infinite_image_is_one_clear_line(tiny: nn.Module) -> None:
    images = random_images(2)
    images[0, 1, 0, 3, 3] = torch.inf
    geoaccel.accelerate(tiny, quantization="fp8")
    with pytest.raises(ValueError, match="image 1 of scene 0 holds NaN or infinite values; leave it out"):
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
