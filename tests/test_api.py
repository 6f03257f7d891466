"""The verbs on every backbone."""

from __future__ import annotations

import pytest
import torch
from conftest import Golden
from torch import nn

import geoaccel


def test_restore_is_bit_exact(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    with torch.no_grad():
        before = tiny(images)
        geoaccel.accelerate(tiny, attention="matmul")
        assert "matmul" in str(geoaccel.describe(tiny))
        geoaccel.restore(tiny)
        after = tiny(images)
    assert "matmul" not in str(geoaccel.describe(tiny))
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key


def test_accelerate_replaces_an_earlier_call(tiny: nn.Module) -> None:
    keys = list(tiny.state_dict())
    twice = geoaccel.accelerate(geoaccel.accelerate(tiny, attention="matmul"), attention="sdpa")
    assert twice is tiny
    assert str(geoaccel.describe(twice)) == str(geoaccel.describe(geoaccel.accelerate(twice)))
    assert list(tiny.state_dict()) == keys


@pytest.mark.parametrize("axis", ["merging", "quantization", "attention"])
def test_typos_name_what_there_is_and_change_nothing(tiny: nn.Module, axis: str) -> None:
    geoaccel.accelerate(tiny, attention="matmul")
    before = str(geoaccel.describe(tiny))
    with pytest.raises(ValueError, match=r"unknown .* 'htm'; known: "):
        geoaccel.accelerate(tiny, **{axis: "htm"})
    assert str(geoaccel.describe(tiny)) == before


def test_attention_typo_suggests() -> None:
    with pytest.raises(ValueError, match="Did you mean 'sdpa'"):
        geoaccel.accelerate(nn.Linear(1, 1), attention="sdp")


def test_describe_counts(tiny: nn.Module) -> None:
    description = geoaccel.describe(tiny)
    assert description.parameters == sum(p.numel() for p in tiny.parameters())
    assert sum(description.dtypes.values()) == description.parameters
    assert sum(description.mixers["global"].values()) == len(tiny.backbone.sites(tiny)["global"])
    with pytest.raises(ValueError, match="no geoaccel model"):
        geoaccel.describe(nn.Linear(1, 1))


def test_no_global_state_is_touched(tiny: nn.Module, golden: Golden) -> None:
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    with torch.no_grad():
        geoaccel.accelerate(tiny, attention="matmul")(golden["inputs.images"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]


def test_lists_are_sorted_names() -> None:
    for names in (geoaccel.list_models(), geoaccel.list_merging(), geoaccel.list_quantization()):
        assert names == sorted(names)
