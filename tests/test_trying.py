"""`accelerated`: after the block a model is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Golden
from torch import Tensor, nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.merging import FastVGGT
from geoaccel.quantization import FP8, W4A16

MERGED = FastVGGT(ratio=0.5, bypass=False)


def outputs(model: nn.Module, golden: Golden) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(golden["inputs.images"]).items() if isinstance(value, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("before", [{}, {"attention": "matmul"}, {"quantization": "fp8"}, {"merging": "httm"}])
@pytest.mark.parametrize("within", [{"merging": MERGED}, {"merging": MERGED, "quantization": W4A16(group_size=16)}])
def test_a_model_is_what_it_was(
    tiny: nn.Module, golden: Golden, before: dict[str, Any], within: dict[str, Any]
) -> None:
    geoaccel.accelerate(tiny, **before, keep_original=True)
    first, keys = outputs(tiny, golden), list(tiny.state_dict())
    with geoaccel.accelerated(tiny, **within) as fast:
        assert fast is tiny
        assert not same(first, outputs(fast, golden))
    assert same(first, outputs(tiny, golden))
    assert list(tiny.state_dict()) == keys


def test_an_error_within_the_block_does_not_matter(tiny: nn.Module, golden: Golden) -> None:
    first = outputs(tiny, golden)
    with pytest.raises(RuntimeError, match="within"), geoaccel.accelerated(tiny, merging=MERGED, quantization="fp8"):
        raise RuntimeError("within")
    assert same(first, outputs(tiny, golden))


def test_quantized_weights_that_are_alone_stay(tiny: nn.Module, golden: Golden) -> None:
    geoaccel.accelerate(tiny, quantization=FP8())
    first = outputs(tiny, golden)
    with geoaccel.accelerated(tiny, merging=MERGED) as fast:
        assert not same(first, outputs(fast, golden))
    assert same(first, outputs(tiny, golden))
    with (
        pytest.raises(ValueError, match=r"float weights of .* are gone"),
        geoaccel.accelerated(tiny, quantization="w4a16"),
    ):
        pass
    assert same(first, outputs(tiny, golden))


def test_the_float_weights_are_kept_anyway(tiny: nn.Module) -> None:
    with pytest.raises(UserError, match="leave it out"), geoaccel.accelerated(tiny, keep_original=False):
        pass
