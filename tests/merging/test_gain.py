"""The rule that a method acts only where the whole forward gains enough: what is predicted, and who hears of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from references import Golden
from torch import nn

import geoaccel
from geoaccel.cost import Cost, Trunk
from geoaccel.layout import TokenLayout
from geoaccel.merging import Extra, Work, gain
from geoaccel.merging.alike import Alike
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.fastvggt import FastVGGT
from geoaccel.merging.gain import Setting, attention_gain, packing_gain, seconds, too_little
from geoaccel.merging.httm import HTTM
from geoaccel.merging.rates import Kind, Rates
from geoaccel.testing.rules import run

# Powers of two, so that every sum below is exact.
RATES = Rates(
    linear=1.0, heads=2.0, attend=4.0, attend_frames=8.0, match=16.0, match_heads=32.0, merge=64.0, merge_heads=128.0,
    pack=256.0, read=512.0, start=1024.0,
)  # fmt: skip
KIND = Kind(torch.device("cpu"), torch.float32, width=8, head_dim=4)
LAYOUT = TokenLayout(1, 2, (1, 3), 1)
SETTING = Setting(Trunk(8, 1, 2, 1, 1, encoder_special=1, special=1), head_work=10.0, packed_from=0.5)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "rates_for", lambda kind: RATES)


def test_every_part_takes_its_rate() -> None:
    """Halves of FLOPs are multiply-adds; a query and a key of a head of four channels are eight of them."""
    for part, expected in {
        **dict.fromkeys(("patch embedding", "encoder linears", "frame linears", "global linears"), 1.0),
        "heads": 2.0,
        "encoder products": 8.0 / 8,
        "frame products": 8.0 / 8,
        "global products": 4.0 / 8,
    }.items():
        assert seconds(Cost(1, {part: 2.0}), RATES, head_dim=4) == expected, part
    names = ("pairs", "head_pairs", "merged", "merged_heads", "packed", "read", "products", "attended", "operations")
    each = [Extra(**{name: 1.0}).seconds(RATES) for name in names]
    assert each == [16, 32, 64, 128, 256, 512, 1, 4, 1024]
    assert (Extra(read=1.0) + Extra(read=3.0, pairs=2.0)).shared(2) == Extra(read=2.0, pairs=1.0)


def test_an_attention_by_itself(by_hand: None) -> None:
    """Eight tokens and two heads: 128 pairs, of which a quarter are left, 96 x 4 seconds less."""
    assert attention_gain(Work(8, 4, 4), LAYOUT, KIND) == 4
    assert attention_gain(Work(8, 4, 4, Extra(products=128.0)), LAYOUT, KIND) == 2
    assert attention_gain(Work(8, 8, 8), LAYOUT, KIND) == 1


def test_the_whole_forward_counts(by_hand: None) -> None:
    """Every second saved in the one global attention is a second of the forward."""
    whole = seconds(SETTING.cost(LAYOUT), RATES, 4)
    assert attention_gain(Work(8, 4, 4), LAYOUT, KIND, SETTING) == pytest.approx(whole / (whole - 96 * 4))
    costly = Work(8, 4, 4, Extra(operations=1.0))
    assert attention_gain(costly, LAYOUT, KIND, SETTING) == pytest.approx(whole / (whole - 96 * 4 + 1024))
    three = replace(SETTING, trunk=replace(SETTING.trunk, global_blocks=3))
    more = whole + 2 * (12 * 64 * 8 + 128 * 4)
    assert attention_gain(Work(8, 4, 4), LAYOUT, KIND, three) == pytest.approx(more / (more - 3 * 96 * 4))


def test_a_packer_shortens_what_stands_behind_it(by_hand: None) -> None:
    """And a method inside what it packed predicts from the shorter forward."""
    cost = SETTING.cost(LAYOUT)
    packed = seconds(cost.packed(0.5, encoder=0.5), RATES, 4)
    found = packing_gain(0.5, Extra(read=1.0), LAYOUT, KIND, SETTING)
    assert found == pytest.approx(seconds(cost, RATES, 4) / (packed + 512))
    inner = attention_gain(Work(4, 2, 2), LAYOUT, KIND, SETTING)
    assert inner == pytest.approx(packed / (packed - (16 - 4) * 2 * 4))


def test_too_little_says_the_figures() -> None:
    assert too_little(1.2076, 1.15) is None
    assert too_little(1.2074, 1.15) == "1.20x predicted, which may be too high by 5 % and below min_gain=1.15"
    assert too_little(1.155, 1.15) == "1.15x predicted, which may be too high by 5 % and below min_gain=1.15"
    assert too_little(1.1499, 1.15) == "1.14x predicted, below min_gain=1.15"
    assert too_little(0.304, 1.15) == "0.30x predicted, below min_gain=1.15"
    assert too_little(1.001, 1.0) is None
    assert too_little(1.0, 1.0) == "1.00x predicted, below min_gain=1"


METHODS = (FastVGGT, HTTM, Asymmetric, Alike)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("acts", [True, False])
def test_a_method_acts_from_its_least_gain_on(tiny: nn.Module, golden: Golden, method: Any, acts: bool) -> None:
    """On the networks' own photographs, with a starting cost that is nothing."""
    images = golden["inputs.images"]
    knobs = {"keys": 1.5} if method is Asymmetric else {}
    dense = run(tiny, images)
    fast = dict.fromkeys(("match", "match_heads", "merge", "merge_heads", "pack", "read", "start"), 1e-30)
    free = replace(Rates.built_in("cpu", 32, 16), **fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "rates_for", lambda kind: free)
        patch.setattr(gain, "ERROR", 1.0)
        geoaccel.accelerate(tiny, merging=method(min_gain=1e9, **knobs))
        run(tiny, images)
        predicted = geoaccel.describe(tiny).merging[0].gain
        assert predicted is not None
        assert predicted > 1.001
        least = predicted * (0.9999 if acts else 1.0001)
        geoaccel.accelerate(tiny, merging=method(min_gain=least, **knobs))
        found = run(tiny, images)
    assert all(torch.equal(found[key], dense[key]) for key in dense) == (not acts)
    description = geoaccel.describe(tiny)
    (action,) = description.merging
    if acts:
        assert f"predicted {action.gain:.2f}x end to end" in str(description)
        assert description.gain == pytest.approx(action.gain)
    else:
        assert f"x predicted, below min_gain={least:g}" in str(description)
        assert (description.gain, action.gain) == (1, pytest.approx(predicted))


def test_accelerate_says_in_which_network_a_method_stands(tiny: nn.Module) -> None:
    model: Any = geoaccel.accelerate(tiny, merging=[Alike(tap=0), HTTM()])
    (packer,) = {m.token_packer for m in model.modules() if getattr(m, "token_packer", None) is not None}
    mixers = [site.mixer for site in model.backbone.sites(model)["global"]]
    assert {mixer.setting for mixer in mixers} == {packer.setting}
    setting = packer.setting
    assert setting.trunk == model.trunk
    assert setting.packed_from == 1 / model.trunk.encoder_blocks
    side = model.preprocess.size // setting.trunk.patch_size * setting.trunk.patch_size
    cost = setting.cost(TokenLayout(1, 3, (side // setting.trunk.patch_size,) * 2, 5))
    assert cost.parts == pytest.approx(model.cost(3, (side, side)).parts)


def test_describe_says_by_which_rates(tiny: nn.Module) -> None:
    assert geoaccel.describe(tiny).gain is None
    geoaccel.accelerate(tiny, merging="httm")
    assert "rates for predictions: built in" in str(geoaccel.describe(tiny))
    assert geoaccel.describe(tiny).gain is None  # no forward yet
    assert "rates" not in str(geoaccel.describe(geoaccel.restore(tiny)))
