"""Parts of tables: the results in `benchmarks/`, and lines of markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODELS = ("vggt-mini", "pi3-mini")


def read(what: str) -> dict[str, dict[str, Any]]:
    """The results of both models; ``{}`` in the name is replaced by the model."""
    return {model: json.loads((BENCHMARKS / what.format(model)).read_text()) for model in MODELS}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of markdown."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (list(header), *map(list, rows))]
    return [lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]]
