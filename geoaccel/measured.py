"""Cached measurements of this machine, so that decisions based on them do not change from run to run.

One JSON file per measurement, in ``geoaccel/`` of the user's cache folder (``XDG_CACHE_HOME``), with everything that
it depends on. Delete a file to measure again. ``GEOACCEL_RATES=built-in`` turns measuring and reading off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_json

SWITCH = "GEOACCEL_RATES"


def built_in_only() -> bool:
    """Whether the environment variable turns measuring off.

    Raises:
        UserError: If its value is unknown.
    """
    word = os.environ.get(SWITCH, "measured")
    if word not in ("measured", "built-in"):
        raise UserError(f"{SWITCH}={word!r}; known: measured, built-in")
    return word == "built-in"


def can_measure(device: torch.device) -> bool:
    """Whether operations really run now and can be synchronised."""
    if _get_current_dispatch_mode() is not None:  # fake tensors, counters
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def folder() -> Path:
    """The folder of the measurements."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "geoaccel"


def read(kind: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored values of a kind for exactly these conditions; None if there are none, or they are damaged."""
    found = read_file(_path(kind, of))
    return found if found is not None and found.get("of") == of else None


def write(kind: str, of: Mapping[str, Any], **values: Any) -> None:
    """Store values; if the folder cannot be written, they last as long as the process."""
    path = _path(kind, of)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"of": of, **values}, indent=1) + "\n")
    except (OSError, UserError):
        return


def read_file(path: Path) -> dict[str, Any] | None:
    """The contents of a file; None if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged: measured again
        return None
    return found if isinstance(found, dict) else None


def _path(kind: str, of: Mapping[str, Any]) -> Path:
    return folder() / f"{kind}-{of_json(of)}.json"
