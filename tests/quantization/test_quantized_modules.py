"""Quantized layers as modules: casts, copies, pickles, saved state, modes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from quantized_layers import buffers, layer, linear, method, same, tokens  # noqa: F401 (fixtures)
from references import relative_error
from torch import nn

from geoaccel.linears import QuantizedLinear
from geoaccel.quantization import FP8, W4A16, Quantization
from geoaccel.quantization.formats import fp8


def test_sizes_and_names_of_buffers() -> None:
    w4, ragged = W4A16().quantize(linear(256, 32)), W4A16().quantize(linear(192, 48))
    assert {name: list(tensor.shape) for name, tensor in w4.state_dict().items()} == {
        "weight_q": [32, 128], "weight_scale": [32, 2], "weight_zero": [32, 2], "bias": [32],
    }  # fmt: skip
    assert w4.stored_bytes == 256 * 32 * (4 + 32 / 128) / 8
    assert ragged.weight_scale.shape == (48, 2)
    assert "last group of a row has 64 inputs" in ragged.runs_as
    assert "last group" not in w4.runs_as
    eight = FP8().quantize(linear(256, 32, bias=False))
    assert {name: list(tensor.shape) for name, tensor in eight.state_dict().items()} == {
        "weight_q": [32, 256], "weight_scale": [32],
    }  # fmt: skip
    assert eight.stored_bytes == 256 * 32 + 4 * 32
    assert not list(w4.parameters())


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casts_leave_the_weights_alone(layer: QuantizedLinear, cast: Any) -> None:
    before = copy.deepcopy(layer)
    dtype = cast(nn.Linear(1, 1)).bias.dtype
    parent = cast(nn.Sequential(layer))
    assert parent[0] is layer
    for name in layer.stored:
        assert getattr(layer, name).dtype == getattr(before, name).dtype
        assert torch.equal(getattr(layer, name).view(torch.uint8), getattr(before, name).view(torch.uint8))
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert layer(tokens(3, 192).to(dtype)).dtype == dtype


def test_without_memory_and_back(method: Quantization, layer: QuantizedLinear) -> None:
    empty = method.layer(192, 48, bias=True, device="meta")
    assert all(buffer.is_meta for buffer in empty.buffers())
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
    }
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert same(filled, layer)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(empty, layer)
    x = tokens(3, 192)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles(layer: QuantizedLinear, duplicate: Any) -> None:
    other = duplicate(layer)
    assert same(other, layer)
    assert other.method == layer.method
    assert torch.equal(other(tokens(3, 192)), layer(tokens(3, 192)))
    assert other.weight_q.data_ptr() != layer.weight_q.data_ptr()


def test_saved_state_is_bit_exact(method: Quantization, layer: QuantizedLinear) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = method.layer(192, 48, bias=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other, layer)


def test_autocast_is_obeyed_as_by_a_float_layer(layer: QuantizedLinear) -> None:
    x = tokens(3, 192)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == linear()(x).dtype == torch.bfloat16
    assert relative_error(layer(x.bfloat16()), layer(x)) < 0.02


def test_nothing_global_is_touched(method: Quantization) -> None:
    flags = [
        torch.get_rng_state,
        torch.is_grad_enabled,
        torch.get_default_dtype,
        torch.get_num_threads,
        torch.get_float32_matmul_precision,
    ]
    before = [flag() for flag in flags]
    fp8._try_product.cache_clear()
    fp8.missing_product("cpu", None)
    method.quantize(linear())(tokens(3, 192))
    after = [flag() for flag in flags]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_float_layer(method: Quantization, training: bool) -> None:
    assert method.quantize(linear().train(training)).training is training


def test_methods_print_what_was_changed(layer: QuantizedLinear) -> None:
    assert str(FP8()) == "fp8"
    assert str(W4A16(group_size=32, exclude="a.*")) == "w4a16(exclude=('a.*',), group_size=32)"
    assert "in_features=192, out_features=48, bias=True" in repr(layer)
    assert hash(W4A16()) == hash(W4A16())
