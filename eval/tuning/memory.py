"""Linears in few bits, as far as a memory limit requires: for each block float, fp8 or w4a16."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from geoaccel.errors import UserError
from geoaccel.eval.tuning.budget import Budget, three_digits
from geoaccel.eval.tuning.knapsack import Option, closest, front
from geoaccel.eval.tuning.trials import NAMES, Change, Errors, Trials
from geoaccel.memory import CPU_PROCESS, HEADROOM, activation_bytes, reserved, weight_bytes
from geoaccel.quantization import FP8, W4A16
from geoaccel.quantization.calibrate.allocation import Unit, find_units
from geoaccel.quantization.calibrate.search import Track
from geoaccel.quantization.method import Quantization

FORMATS: dict[str, Quantization | None] = {"float": None, "fp8": FP8(activations=False), "w4a16": W4A16()}
"""Formats of a block's linears. fp8 does not quantize activations here, as only memory matters."""


@dataclass(frozen=True)
class Small:
    """The choice for the linears.

    Attributes:
        quantization: Methods with the names of their layers; empty if everything stays float.
        errors: The sum of the errors of each alone.
        needed: Resulting bytes of weights and activations.
        alone: Errors of each format alone, block by block; empty if nothing had to be tried.
        chosen: Format of each block.
    """

    quantization: tuple[Quantization, ...] = ()
    errors: Errors = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    needed: int = 0
    alone: dict[str, dict[str, Errors]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


def smallest(
    trials: Trials, budget: Budget, frames: int, size: tuple[int, int], track: Track[Any], clips: str
) -> Small:
    """The formats of least error that fit in memory; nothing is tried if float fits.

    Raises:
        ValueError: If nothing fits.
    """
    needed = needed_bytes(trials.model, frames, size)
    if budget.memory_bytes is None or needed <= budget.memory_bytes:
        return Small(needed=needed)
    units = units_of(trials.model)
    check_fits(trials.model, budget, frames, size)
    alone: dict[str, dict[str, Errors]] = {}
    steps = [(unit, name) for unit in units for name in FORMATS]
    for unit, name in track(steps, "blocks", len(steps)):
        method = FORMATS[name]
        own = dict.fromkeys(NAMES, 0.0)
        if method is not None:
            own = trials.errors(Change(quantization=(_only(method, unit.layers),)), clips)
        alone.setdefault(unit.name, {})[name] = own
    groups = [
        [Option(budget.share(alone[unit.name][name]), float(_bytes(trials.model, unit, name))) for name in FORMATS]
        for unit in units
    ]
    weights = sum(_bytes(trials.model, unit, "float") for unit in units)
    pick = closest(front(groups), budget.memory_bytes - needed + weights)
    if pick is None:
        raise UserError("quantized as far as --max-memory requires, the model predicts NaN; give more memory")
    chosen = {unit.name: list(FORMATS)[i] for unit, i in zip(units, pick.chosen, strict=True)}
    methods = []
    for name, method in FORMATS.items():
        layers = tuple(layer for unit in units if chosen[unit.name] == name for layer in unit.layers)
        if method is not None and layers:
            methods.append(_only(method, layers))
    errors = {name: sum(alone[unit][form][name] for unit, form in chosen.items()) for name in NAMES}
    return Small(tuple(methods), errors, needed - weights + int(pick.cost), alone, chosen)


def needed_bytes(model: nn.Module, frames: int, size: tuple[int, int]) -> int:
    """Memory that ``reconstruct --max-memory`` would need: the process, weights and a forward with the smallest plan.

    The size of the process is a constant, so that a plan is reproducible.
    """
    network: Any = model
    device = next(model.parameters()).device.type
    process = CPU_PROCESS if device == "cpu" else reserved(device)
    plans = [None, *network.memory_plans(device)]
    least = min(activation_bytes(model, frames, size, device, plan=plan) for plan in plans)
    return weight_bytes(model) + process + int(HEADROOM * least)


def check_fits(model: nn.Module, budget: Budget, frames: int, size: tuple[int, int]) -> None:
    """Reject a limit below the memory with everything in four bits.

    Raises:
        ValueError: With the smallest possible limit.
    """
    if budget.memory_bytes is None:
        return
    units = units_of(model)
    least = needed_bytes(model, frames, size) + sum(
        min(_bytes(model, unit, name) for name in FORMATS) - _bytes(model, unit, "float") for unit in units
    )
    if budget.memory_bytes < least:
        needed = f"{three_digits(least / 1e9, up=True):.3g} GB"
        raise UserError(
            f"--max-memory {budget.memory_bytes / 1e9:.4g}GB: {frames} photographs of {size[0]} x {size[1]} pixels "
            f"need {needed} with all blocks in four bits; give that, or fewer photographs"
        )


def units_of(model: nn.Module) -> list[Unit]:
    """The blocks, with their bytes in four bits and in fp8."""
    low = FORMATS["w4a16"]
    assert low is not None
    return find_units(model, low, FORMATS["fp8"])


def _bytes(model: nn.Module, unit: Unit, name: str) -> int:
    stored = {"fp8": unit.high_bytes, "w4a16": unit.low_bytes}
    return stored.get(name, unit.weights * next(model.parameters()).element_size())


def _only(method: Quantization, layers: Sequence[str]) -> Quantization:
    return dataclasses.replace(method, include=tuple(layers), exclude=())
