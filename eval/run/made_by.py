"""Provenance of predictions and measurements: code, machine and versions; and JSON files that carry it.

A result on disk is only reused with its provenance: one from other code or another machine is recomputed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from geoaccel import fingerprint
from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.runtime import machine, versions

MADE_BY = "made_by"
# Evaluation modules that, besides the network, affect results; without "geoaccel.".
PREDICTION = (
    *("eval.data", "eval.metrics.geometry", "eval.run.job", "eval.run.prepare"),
    *("eval.run.store", "eval.run.token_effects"),
)
# For whole sequences, additionally: how windows are made and joined.
SEQUENCES = (*PREDICTION, "eval.run.sequences", "eval.run.trajectory", "windows")
TIMING = (*PREDICTION, "eval.bench")
SCORES = (*PREDICTION, "eval.metrics", "eval.run.scoring", "eval.run.runner")
EFFECTS = (*PREDICTION, "eval.metrics", "eval.tools.ablation", "eval.tools.sensitivity")
LAYERS = (*PREDICTION, "eval.metrics.fidelity", "eval.run.layers")


def code(modules: tuple[str, ...] = PREDICTION) -> str:
    """Fingerprint of the source code that affects results: of networks and methods, and these evaluation modules."""
    return fingerprint.of_bytes((fingerprint.of_networks() + fingerprint.of_sources(modules)).encode())


def made_by(device: str, modules: tuple[str, ...] = PREDICTION) -> dict[str, Any]:
    """The provenance of results computed now on this machine.

    Args:
        device: Device on which the model runs.
        modules: Evaluation modules that the result depends on.

    Returns:
        ``code``, ``processor``, ``instructions``, ``device``, ``threads`` and versions, as plain data.
    """
    pixels = {name: version(name) for name in ("numpy", "pillow")}
    return {**versions(), **pixels, **machine(device), "code": code(modules)}


@cache
def sitting() -> str:
    """Id of this process: only times measured in one run may be in the same table."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {uuid.uuid4().hex[:8]}"


def write_record(path: str | Path, made: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write a result as JSON, with its provenance."""
    write_text(path, json.dumps({MADE_BY: made, **found}, indent=1) + "\n")


def read_record(path: str | Path, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record written by :func:`write_record`; None if there is none, or one of other provenance.

    Args:
        path: The file.
        made: Provenance to match; other entries of the record are ignored.

    Raises:
        ValueError: If the file is damaged.
    """
    if not Path(path).exists():
        return None
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        before = found.pop(MADE_BY, {})
        wanted = json.loads(json.dumps(made))
        return found if all(key in before and before[key] == value for key, value in wanted.items()) else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again") from None
