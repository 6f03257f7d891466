"""Mixed precision: which blocks get more bits, chosen from measured effects for a budget in bytes or in accuracy.

Every block starts with the low method. Protecting one, with the high method or as float, is assumed to undo its effect,
and effects are assumed to add up; neither is exact, so the result of an allocation must be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from geoaccel.errors import UserError
from geoaccel.quantization.calibrate.blocks import blocks_of
from geoaccel.quantization.method import QUANTIZATION, Quantization, scope_of
from geoaccel.quantization.swap import float_linears, owners
from geoaccel.registry import make

FLOAT_BYTES = 2


@dataclass(frozen=True)
class Unit:
    """A unit of allocation: a block, or a layer outside of all blocks.

    Attributes:
        name: Name of the block or layer.
        layers: Names of its layers that the low method quantizes.
        weights: Number of weights in them.
        low_bytes, high_bytes: Their size in the file.
        magnitude: Mean |w|.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    low_bytes: int
    high_bytes: int
    magnitude: float


@dataclass(frozen=True)
class Allocation:
    """Methods for a whole network.

    Attributes:
        low: For everything except the protected blocks.
        high: For protected blocks; None leaves them float.
        protected: Names of the protected blocks.
        everything: Whether these are all blocks of the low method.
    """

    low: Quantization
    high: Quantization | None = None
    protected: tuple[Unit, ...] = ()
    everything: bool = False

    @classmethod
    def of(
        cls, units: Sequence[Unit], low: Quantization, high: Quantization | None, protected: Sequence[Unit]
    ) -> Allocation:
        """Protect some of all blocks."""
        return cls(low, high, tuple(protected), everything=len(protected) == len(units))

    def methods(self) -> list[Quantization]:
        """For ``accelerate(model, quantization=...)`` and ``export_quantized``; empty if every block stays float."""
        layers = tuple(layer for unit in self.protected for layer in unit.layers)
        if not layers:
            return [self.low]
        low = [] if self.everything else [dataclasses.replace(self.low, exclude=(*self.low.exclude, *layers))]
        return low if self.high is None else [*low, dataclasses.replace(self.high, include=layers, exclude=())]


def find_units(model: nn.Module, low: Quantization, high: Quantization | None) -> list[Unit]:
    """The blocks of a float network that the low method takes, and its layers outside of any."""
    linears = float_linears(model)
    units = []
    for name, layers in blocks_of(owners(linears, [low], scope_of(model))).items():
        members = [linears[layer] for layer in layers]
        weights = sum(linear.weight.numel() for linear in members)
        units.append(
            Unit(
                name,
                tuple(layers),
                weights,
                sum(_bytes(linear, low) for linear in members),
                sum(_bytes(linear, high) for linear in members),
                sum(float(linear.weight.detach().float().abs().sum()) for linear in members) / weights,
            )
        )
    return units


def _bytes(linear: nn.Linear, method: Quantization | None) -> int:
    if method is None:
        return FLOAT_BYTES * linear.weight.numel()
    return method.layer(linear.in_features, linear.out_features, bias=False, device="meta").stored_bytes


def file_bytes(model: nn.Module, units: Sequence[Unit], protected: Sequence[Unit] = ()) -> int:
    """Size of the file: quantized weights, everything else in 16 bits, the network's own constants in 32."""
    rest = sum(tensor.numel() for tensor in model.state_dict().values()) - sum(unit.weights for unit in units)
    rest += sum(constant.numel() for constant in model.buffers(recurse=False))
    return FLOAT_BYTES * rest + sum(unit.high_bytes if unit in protected else unit.low_bytes for unit in units)


def by_worth(units: Sequence[Unit], effects: Mapping[str, float]) -> list[Unit]:
    """The blocks with an effect, sorted by effect per byte that protection adds, largest first.

    Args:
        units: All blocks.
        effects: By name, effect of quantizing each alone; larger is worse.
    """
    worth = {unit.name: effects[unit.name] / max(1, unit.high_bytes - unit.low_bytes) for unit in units}
    return sorted((unit for unit in units if effects[unit.name] > 0), key=lambda unit: -worth[unit.name])


def within_bytes(order: Sequence[Unit], spare: int) -> tuple[Unit, ...]:
    """Blocks in order, without those that no longer fit into the bytes that protection may add."""
    chosen = []
    for unit in order:
        added = unit.high_bytes - unit.low_bytes
        if added <= spare:
            chosen.append(unit)
            spare -= added
    return tuple(chosen)


def within_effect(order: Sequence[Unit], effects: Mapping[str, float], allowed: float) -> tuple[Unit, ...]:
    """Blocks in order, until the effects of the others sum to at most the allowed amount."""
    chosen: list[Unit] = []
    left = sum(max(0.0, effect) for effect in effects.values())
    for unit in order:
        if left <= allowed:
            break
        chosen.append(unit)
        left -= effects[unit.name]
    return tuple(chosen)


def to_records(methods: Sequence[Quantization]) -> list[dict[str, Any]]:
    """Methods as plain data, for a file."""
    return [{"name": method.name, "knobs": dataclasses.asdict(method)} for method in methods]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[Quantization]:
    """Methods from records of :func:`to_records`.

    Raises:
        ValueError: If they are invalid, or name a method or a knob that does not exist.
    """
    try:
        return [make(QUANTIZATION, record["name"], record["knobs"]) for record in records]
    except (KeyError, TypeError) as error:
        raise UserError(f"these are not valid records of quantization methods ({error})") from None
