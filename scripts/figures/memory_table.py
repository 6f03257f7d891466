"""The tables of docs/memory.md, from rows of tests/device/memory_peaks.py and of measure_resident.py.

python scripts/figures/memory_table.py            # prints them
python scripts/figures/memory_table.py --write    # and puts them into the document
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from geoaccel.errors import run_program

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, ROWS = ROOT / "docs" / "memory.md", ROOT / "benchmarks" / "memory-simulated-vggt.json"
RESIDENT = ROOT / "benchmarks" / "memory-cpu.json"
BEGIN, END = "<!-- table of scripts/figures/memory_table.py -->\n", "<!-- end of the table -->"
BEGIN_RESIDENT = "<!-- resident, table of scripts/figures/memory_table.py -->\n"
COLUMNS = ((100, None), (300, None), (300, "12GB"), (1000, None), (1000, "24GB"))


def table(rows: list[dict[str, Any]]) -> str:
    """One row per method: counted and predicted; a dash if not run."""
    names = [f"{frames} frames{f', {limit}' if limit else ''}" for frames, limit in COLUMNS]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    found = {(row["method"], row["frames"], row["max_memory"]): row for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for column in COLUMNS:
            row = found.get((method, *column))
            cells.append("-" if row is None else f"{row['peak_gib']:.1f} ({row['predicted_gib']:.1f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def resident_table(rows: list[dict[str, Any]]) -> str:
    """One row per network and plan: measured, predicted, and whether the outputs equal those without a plan."""
    lines = ["| | frames | plan | resident MiB | predicted | outputs |", "|---|---:|---|---:|---:|---|"]
    whole = {(row["model"], row["frames"]): row["outputs"] for row in rows if row["plan"] is None}
    for row in rows:
        same = "equal to the bit" if row["outputs"] == whole[row["model"], row["frames"]] else "**differ**"
        plan, outputs = row["plan"] or "everything at once", same if row["plan"] else ""
        cells = (row["frames"], plan, row["resident_mib"], row["predicted_mib"], outputs)
        lines.append(f"| `{row['model']}` | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """By marker, the text after it."""
    return {
        BEGIN: table(json.loads(ROWS.read_text())),
        BEGIN_RESIDENT: resident_table(json.loads(RESIDENT.read_text())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/memory.md")
    write = parser.parse_args().write
    for begin, text in tables().items():
        if write:
            before, _, rest = DOCUMENT.read_text().partition(begin)
            DOCUMENT.write_text(f"{before}{begin}{text}{END}{rest.partition(END)[2]}")
        print(text)


if __name__ == "__main__":
    sys.exit(run_program("memory_table", main))
