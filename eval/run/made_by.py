"""Provenance of predictions and measurements: code, machine and versions; and JSON files that carry it.

A result on disk is shown under what made it, or not at all: one of other code or of another machine is made anew.
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
# Modules of evaluation that decide, beside the network, what is found; without "geoaccel.".
PREDICTION = (
    *("eval.data", "eval.metrics.geometry", "eval.run.job", "eval.run.prepare"),
    *("eval.run.store", "eval.run.token_effects"),
)
# Of whole sequences, beside these: how windows are made and joined.
SEQUENCES = (*PREDICTION, "eval.run.sequences", "eval.run.trajectory", "windows")
TIMING = (*PREDICTION, "eval.bench")
SCORES = (*PREDICTION, "eval.metrics", "eval.run.scoring", "eval.run.runner")
EFFECTS = (*PREDICTION, "eval.metrics", "eval.tools.ablation", "eval.tools.sensitivity")
LAYERS = (*PREDICTION, "eval.metrics.fidelity", "eval.run.layers")


def code(modules: tuple[str, ...] = PREDICTION) -> str:
    """Fingerprint of the sources that decide: those of networks and methods, and these of evaluation."""
    return fingerprint.of_bytes((fingerprint.of_networks() + fingerprint.of_sources(modules)).encode())


def made_by(device: str, modules: tuple[str, ...] = PREDICTION) -> dict[str, Any]:
    """The record of what would make a result here and now.

    Args:
        device: On which the model runs.
        modules: Of evaluation, that the result depends on.

    Returns:
        ``code``, ``processor``, ``instructions``, ``device``, ``threads`` and versions, as plain data.
    """
    pixels = {name: version(name) for name in ("numpy", "pillow")}
    return {**versions(), **pixels, **machine(device), "code": code(modules)}


@cache
def sitting() -> str:
    """Name of this process: what is timed in one sitting may stand in one table, other times may not."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {uuid.uuid4().hex[:8]}"


def write_record(path: str | Path, made: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write what was found, as JSON, and what made it."""
    write_text(path, json.dumps({MADE_BY: made, **found}, indent=1) + "\n")


def read_record(path: str | Path, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that :func:`write_record` wrote; None where there is nothing, or something that was made by another.

    Args:
        path: The file.
        made: What counts; entries of the record that are not named here may be any.

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
