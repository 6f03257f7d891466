"""What was measured of this machine, kept so that what follows from it is decided alike today and tomorrow.

One JSON file for each measurement, in ``geoaccel/`` of the user's cache folder (``XDG_CACHE_HOME``), with all that it
depends on. Delete a file to measure anew. ``GEOACCEL_RATES=built-in`` says that nothing is measured and nothing read.
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
    """What the switch says.

    Raises:
        UserError: If it says something else.
    """
    word = os.environ.get(SWITCH, "measured")
    if word not in ("measured", "built-in"):
        raise UserError(f"{SWITCH}={word!r}; known: measured, built-in")
    return word == "built-in"


def can_measure(device: torch.device) -> bool:
    """Whether operations really run now, and may be waited for."""
    if _get_current_dispatch_mode() is not None:  # fake tensors, counters
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def folder() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "geoaccel"


def read(kind: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept under a kind for exactly this; None where there is nothing, or it is damaged."""
    found = read_file(_path(kind, of))
    return found if found is not None and found.get("of") == of else None


def write(kind: str, of: Mapping[str, Any], **values: Any) -> None:
    """Keep values; where the folder cannot be written, they last as long as the process."""
    path = _path(kind, of)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"of": of, **values}, indent=1) + "\n")
    except (OSError, UserError):
        return


def read_file(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or damaged: measured anew
        return None
    return found if isinstance(found, dict) else None


def _path(kind: str, of: Mapping[str, Any]) -> Path:
    return folder() / f"{kind}-{of_json(of)}.json"
