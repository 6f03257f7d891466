"""How fast this machine is at what a forward and a merging method do: what the gain of a method is predicted from.

Rates are measured once (:mod:`geoaccel.merging.microbenchmarks`, a second or two) for each device, dtype, number of
threads, width and kernel, and kept in the process and in ``geoaccel/rates-<key>.json`` of the user's cache folder
(``XDG_CACHE_HOME``), so that a method decides alike today and tomorrow. Delete the files to measure anew. Where nothing
can be measured (meta and fake tensors, under ``torch.compile``, while a CUDA graph is captured, on other devices), and
everywhere with ``GEOACCEL_RATES=built-in``, a table stands in.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_json
from geoaccel.merging.microbenchmarks import measure
from geoaccel.merging.rates import VERSION, Kind, Rates
from geoaccel.runtime import machine

SWITCH = "GEOACCEL_RATES"

_KNOWN: dict[tuple[Any, ...], Rates] = {}


def rates_for(kind: Kind) -> Rates:
    """The rates of a kind: those of this process, those on disk, measured now, or built in."""
    device_type = kind.device.type
    if torch.compiler.is_compiling():
        return _KNOWN.get(kind.key) or Rates.built_in(device_type, kind.width, kind.head_dim)
    if _built_in_only() or device_type not in ("cpu", "cuda"):
        return Rates.built_in(device_type, kind.width, kind.head_dim)
    if kind.key not in _KNOWN:
        found = _read(kind)
        if found is None:
            if not _can_measure(kind.device):
                return Rates.built_in(device_type, kind.width, kind.head_dim)
            found = measure(kind)
            _write(kind, found)
        _KNOWN[kind.key] = found
    return _KNOWN[kind.key]


def in_use(device: str) -> str:
    """Which rates a method would decide by, in one line."""
    if _built_in_only():
        return f"built in ({SWITCH}=built-in)"
    here = machine(device)
    found = []
    for path in sorted(folder().glob("rates-*.json")):
        of = (_json(path) or {}).get("of")
        if not isinstance(of, dict):
            continue
        if of.get("version") == VERSION and all(of.get(key) == value for key, value in here.items()):
            found.append(f"{of.get('dtype')} at width {of.get('width')} with {of.get('kernel')}")
    if not found:
        return "measured when a method first needs them"
    return f"measured for {'; '.join(sorted(set(found)))} (in {folder()})"


def folder() -> Path:
    """Where rates are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "geoaccel"


def _built_in_only() -> bool:
    """What the switch says.

    Raises:
        UserError: If it says something else.
    """
    word = os.environ.get(SWITCH, "measured")
    if word not in ("measured", "built-in"):
        raise UserError(f"{SWITCH}={word!r}; known: measured, built-in")
    return word == "built-in"


def _can_measure(device: torch.device) -> bool:
    """Whether operations really run now, and may be waited for."""
    if _get_current_dispatch_mode() is not None:  # fake tensors, counters
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _path(kind: Kind) -> Path:
    return folder() / f"rates-{of_json(kind.on_this_machine())}.json"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or damaged: measured anew
        return None
    return found if isinstance(found, dict) else None


def _read(kind: Kind) -> Rates | None:
    found = _json(_path(kind))
    if found is None or found.get("of") != kind.on_this_machine():
        return None
    seconds = found.get("seconds")
    names = {field.name for field in fields(Rates)} - {"measured"}
    if not isinstance(seconds, dict) or seconds.keys() != names:
        return None
    if not all(isinstance(value, float) and isfinite(value) and value > 0 for value in seconds.values()):
        return None
    return Rates(**seconds, measured=True)


def _write(kind: Kind, rates: Rates) -> None:
    """Where the folder cannot be written, rates last as long as the process."""
    seconds = asdict(rates)
    del seconds["measured"]
    path = _path(kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"of": kind.on_this_machine(), "seconds": seconds}, indent=1) + "\n")
    except (OSError, UserError):
        return
