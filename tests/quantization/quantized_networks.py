"""Whole networks to quantize, with every method, and their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geoaccel.quantization import FP8, W4A16, Quantization

# Tiny networks are 32 wide and 128 in the middle of an MLP: groups of every kind.
METHODS = [FP8(), W4A16(group_size=48)]


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Quantization:
    return request.param


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
