"""Rates of this machine for the operations of a forward and of merging, from which speedups are predicted.

Rates are measured once (:mod:`geoaccel.merging.microbenchmarks`, a second or two) for each device, dtype, number of
threads, width and kernel, and cached in the process and in ``geoaccel/rates-<key>.json`` of the user's cache folder
(``XDG_CACHE_HOME``), so that decisions do not change from run to run. Delete the files to measure again. If nothing can
be measured (meta and fake tensors, under ``torch.compile``, during CUDA graph capture, on other devices), and always
with ``GEOACCEL_RATES=built-in``, a built-in table is used.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from math import isfinite
from typing import Any

import torch

from geoaccel import measured
from geoaccel.measured import SWITCH, built_in_only, can_measure, folder
from geoaccel.merging.microbenchmarks import measure
from geoaccel.merging.rates import VERSION, Kind, Rates
from geoaccel.runtime import machine

_KNOWN: dict[tuple[Any, ...], Rates] = {}


def rates_for(kind: Kind) -> Rates:
    """The rates of a kind: from this process, from disk, measured now, or built in."""
    device_type = kind.device.type
    if torch.compiler.is_compiling():
        return _KNOWN.get(kind.key) or Rates.built_in(device_type, kind.width, kind.head_dim)
    if built_in_only() or device_type not in ("cpu", "cuda"):
        return Rates.built_in(device_type, kind.width, kind.head_dim)
    if kind.key not in _KNOWN:
        found = _read(kind)
        if found is None:
            if not can_measure(kind.device):
                return Rates.built_in(device_type, kind.width, kind.head_dim)
            found = measure(kind)
            _write(kind, found)
        _KNOWN[kind.key] = found
    return _KNOWN[kind.key]


def in_use(device: str) -> str:
    """The rates that a method would use, in one line."""
    if built_in_only():
        return f"built in ({SWITCH}=built-in)"
    here = machine(device)
    found = []
    for path in sorted(folder().glob("rates-*.json")):
        of = (measured.read_file(path) or {}).get("of")
        if not isinstance(of, dict):
            continue
        if of.get("version") == VERSION and all(of.get(key) == value for key, value in here.items()):
            found.append(f"{of.get('dtype')} at width {of.get('width')} with {of.get('kernel')}")
    if not found:
        return "measured when a method first needs them"
    return f"measured for {'; '.join(sorted(set(found)))} (in {folder()})"


def _read(kind: Kind) -> Rates | None:
    seconds = (measured.read("rates", kind.on_this_machine()) or {}).get("seconds")
    names = {field.name for field in fields(Rates)} - {"measured"}
    if not isinstance(seconds, dict) or seconds.keys() != names:
        return None
    if not all(isinstance(value, float) and isfinite(value) and value > 0 for value in seconds.values()):
        return None
    return Rates(**seconds, measured=True)


def _write(kind: Kind, rates: Rates) -> None:
    seconds = asdict(rates)
    del seconds["measured"]
    measured.write("rates", kind.on_this_machine(), seconds=seconds)
