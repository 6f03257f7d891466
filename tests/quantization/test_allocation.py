"""Mixed precision: budgets are kept, the worst blocks go first, and sizes are those of real files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from geoaccel.linears import quantized_linears
from geoaccel.models.weights import save_model
from geoaccel.quantization import FP8, W4A16, Allocation, Quantization, quantize, scope_of
from geoaccel.quantization.calibrate.allocation import (
    Unit,
    by_worth,
    file_bytes,
    find_units,
    from_records,
    to_records,
    within_bytes,
    within_effect,
)
from geoaccel.quantization.calibrate.blocks import find_blocks
from geoaccel.quantization.swap import float_linears

LOW, HIGH = W4A16(group_size=16), FP8(activations=False)


def unit(name: str, added: int) -> Unit:
    return Unit(name, (f"{name}.fc",), 100, 10, 10 + added, 0.1)


UNITS = [unit("a", 10), unit("b", 10), unit("c", 40), unit("d", 10)]
EFFECTS = {"a": 1.0, "b": 3.0, "c": 8.0, "d": -1.0}


def names(units: tuple[Unit, ...] | list[Unit]) -> str:
    return "".join(unit.name for unit in units)


def test_the_largest_effect_for_each_byte_goes_first() -> None:
    assert names(by_worth(UNITS, EFFECTS)) == "bca"


@pytest.mark.parametrize(("spare", "expected"), [(0, ""), (9, ""), (10, "b"), (49, "ba"), (50, "bc"), (1000, "bca")])
def test_a_budget_in_bytes(spare: int, expected: str) -> None:
    assert names(within_bytes(by_worth(UNITS, EFFECTS), spare)) == expected


@pytest.mark.parametrize(("allowed", "expected"), [(12, ""), (9, "b"), (1, "bc"), (0, "bca")])
def test_a_budget_in_accuracy(allowed: float, expected: str) -> None:
    assert names(within_effect(by_worth(UNITS, EFFECTS), EFFECTS, allowed)) == expected


def test_units_are_blocks_and_lone_layers(tiny: nn.Module) -> None:
    units = find_units(tiny, LOW, HIGH)
    taken = LOW.select(float_linears(tiny), scope_of(tiny))
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(taken)
    blocks = {name for name in find_blocks(tiny) if f"{name}.attn.qkv" in taken}
    assert blocks
    assert blocks <= {unit.name for unit in units}
    for unit in units:
        weights = [tiny.get_submodule(layer).weight.detach() for layer in unit.layers]
        assert unit.weights == sum(weight.numel() for weight in weights)
        assert unit.magnitude == pytest.approx(float(torch.cat([w.flatten() for w in weights]).abs().mean()), rel=1e-5)
        assert unit.low_bytes < unit.high_bytes < 2 * unit.weights


@pytest.mark.parametrize("high", [HIGH, None], ids=str)
def test_the_size_is_that_of_the_file(tiny: nn.Module, tmp_path: Path, high: Quantization | None) -> None:
    units = find_units(tiny, LOW, high)
    protected = (units[1], units[-1])
    expected = file_bytes(tiny, units, protected)
    quantize(tiny, *Allocation(LOW, high, protected).methods())
    save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float16)
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") + 8
    assert (tmp_path / "a.safetensors").stat().st_size - header == expected


@pytest.mark.parametrize("high", [HIGH, None], ids=str)
def test_protected_blocks_get_the_high_method(tiny: nn.Module, high: Quantization | None) -> None:
    units = find_units(tiny, LOW, high)
    quantize(tiny, *Allocation(LOW, high, (units[2],)).methods())
    layers = quantized_linears(tiny)
    for unit in units:
        for name in unit.layers:
            expected = high if unit == units[2] else LOW
            assert type(layers[name].method if name in layers else None) is type(expected)


def test_an_allocation_stays_within_what_the_low_method_takes(tiny: nn.Module) -> None:
    low = W4A16(group_size=16, include="*.fc1")
    units = find_units(tiny, low, HIGH)
    quantize(tiny, *Allocation(low, HIGH, (units[0],)).methods())
    assert set(quantized_linears(tiny)) == {layer for unit in units for layer in unit.layers}
    assert all(name.endswith("fc1") for name in quantized_linears(tiny))


def test_nothing_protected_is_the_low_method() -> None:
    assert Allocation(LOW, HIGH).methods() == [LOW]


def test_records_come_back() -> None:
    methods = Allocation(LOW, HIGH, (UNITS[0],)).methods()
    assert from_records(to_records(methods)) == methods
    for damaged in ([{"name": "w4a16"}], [{"knobs": {}}], [{"name": "fp8", "knobs": {"bits": 3}}], ["fp8"]):
        with pytest.raises(
            ValueError, match=r"not valid records of quantization methods|unknown knob of fp8 'bits'; known: "
        ):
            from_records(damaged)  # type: ignore[arg-type]
