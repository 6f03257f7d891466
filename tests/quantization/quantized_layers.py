"""Quantized layers to test, of every method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from geoaccel.linears import QuantizedLinear
from geoaccel.quantization import FP8, W4A16, Quantization

METHODS = [FP8(), FP8(activations=False), W4A16(), W4A16(group_size=32)]


SHAPES = [(192, 48), (256, 32), (9, 5)]


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 192, outputs: int = 48, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return layer.requires_grad_(False)


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Quantization:
    return request.param


@pytest.fixture
def layer(method: Quantization) -> QuantizedLinear:
    return method.quantize(linear())


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.view(torch.uint8) for name, tensor in module.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = buffers(a), buffers(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
