"""The written table of waits and launches; ``python tests/device/costs.py`` measures it anew."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from combinations import METHODS, PRECISIONS, Cost, cost, photographs, prepared
from simulated_cuda import SimulatedCuda

TABLE = Path(__file__).with_name("costs.json")
CORE = ("dense", "asymmetric", "come", "come+httm", "fastvggt", "httm", "litevggt")
MORE_LAUNCHES = 0.02
"""Share of launches that may come without a new table."""


def rows() -> Iterator[tuple[str, str, str]]:
    """Backbone, method and precision of each row; the other combinations are run without a table, with ``--slow``."""
    for backbone in ("da3", "pi3", "pi3x", "vggt"):
        for method in METHODS:
            for precision in PRECISIONS:
                core = backbone == "vggt" and method in CORE and precision in ("fp8", "w4a16")
                if method == "dense" or precision == "bfloat16" or core:
                    yield backbone, method, precision


def measured(backbone: str, method: str, precision: str, **sizes: int) -> Cost:
    """One row, or one with other sizes."""
    with SimulatedCuda() as cuda:
        return cost(cuda, prepared(backbone, method, precision, "cuda:0", **sizes), photographs())


def plain(found: Cost) -> dict[str, Any]:
    """A row as it is written."""
    return {"waits": dict(found.waits), "launches": found.by_file}


def complaints(found: Cost, written: dict[str, Any]) -> list[str]:
    """What is more than was written, with the lines that cause it."""
    said = [
        f"waits {count} x in {where}, written are {written['waits'].get(where, 0)}"
        for where, count in found.waits.items()
        if count > written["waits"].get(where, 0)
    ]
    before, now = sum(written["launches"].values()), sum(found.launches.values())
    if now <= (1 + MORE_LAUNCHES) * before:
        return said
    said.append(f"{now} launches, written are {before}")
    for file, count in found.by_file.items():
        if count > written["launches"].get(file, 0):
            lines = [f"{place} {n} x" for place, n in found.launches.most_common() if place.file == file]
            said.append(f"{file}: {count}, written are {written['launches'].get(file, 0)}: {'; '.join(lines[:8])}")
    return said


def table() -> dict[str, dict[str, Any]]:
    """The table as it is written."""
    return json.loads(TABLE.read_text())


def main() -> None:
    """Measure every row."""
    os.environ["GEOACCEL_RATES"] = "built-in"
    lines = []
    for row in rows():
        found = measured(*row)
        print(*row, sum(found.waits.values()), sum(found.launches.values()), flush=True)
        lines.append(f"{json.dumps(' '.join(row))}: {json.dumps(plain(found))}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
