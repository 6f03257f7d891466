"""Runs of ``geoaccel quantize``: small ones, and what they print and write."""

from __future__ import annotations

import json
from typing import Any

from safetensors import safe_open

SMALL = ("--scenes", 2, "--frames", 2, "--group-size", 16)
"""Options of a calibration on two rendered scenes."""


def provenance(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["provenance"])["calibration"]


def refused(result: tuple[int, str, str], says: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("geoaccel: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in err
