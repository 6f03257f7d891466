"""`accelerated`: after the block a model is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Golden
from torch import Tensor, nn
from upstream_objects import upstream_double

import geoaccel
from geoaccel.backbone import BACKBONES
from geoaccel.errors import UserError
from geoaccel.linears import quantized_linears
from geoaccel.merging import FastVGGT
from geoaccel.quantization import FP8, W4A16
from geoaccel.testing import tiny_network

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
        pytest.raises(ValueError, match=r"float weights of .* were not kept"),
        geoaccel.accelerated(tiny, quantization="w4a16"),
    ):
        pass
    assert same(first, outputs(tiny, golden))


@pytest.mark.parametrize("method", [FP8(), W4A16(group_size=16)], ids=str)
def test_quantized_weights_that_are_alone_may_be_named_again(tiny: nn.Module, golden: Golden, method: Any) -> None:
    geoaccel.accelerate(tiny, quantization=method)
    first, layers = outputs(tiny, golden), quantized_linears(tiny)
    with geoaccel.accelerated(tiny, quantization=method, merging=MERGED) as fast:
        assert not same(first, outputs(fast, golden))
    assert same(first, outputs(tiny, golden))
    assert quantized_linears(tiny) == layers


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_upstream_objects_are_adopted_and_what_is_adopted_is_undone(name: str) -> None:
    """Depth Anything 3's has a child that is called like the attribute by which our networks are known."""
    twin = upstream_double(tiny_network(name))
    theirs = type(type(twin).__name__, (nn.Module,), {})()
    vars(theirs).update(vars(twin))
    with torch.no_grad():
        images = torch.rand(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        first = geoaccel.adopt(theirs)(images)["depth" if name in ("da3", "vggt") else "local_points"]
        with geoaccel.accelerated(theirs, merging=MERGED, quantization="fp8") as fast:
            assert geoaccel.describe(fast).merging
            assert quantized_linears(fast)
        assert not geoaccel.describe(fast).merging
        assert not quantized_linears(fast)
        assert torch.equal(fast(images)["depth" if name in ("da3", "vggt") else "local_points"], first)
    assert theirs.training == twin.training


def test_the_float_weights_are_kept_anyway(tiny: nn.Module) -> None:
    with pytest.raises(UserError, match="leave it out"), geoaccel.accelerated(tiny, keep_original=False):
        pass
