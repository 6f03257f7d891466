"""The table of docs/memory.md, from the rows that tests/device/memory_peaks.py has written.

python scripts/figures/memory_table.py            # prints it
python scripts/figures/memory_table.py --write    # and puts it into the document
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
BEGIN, END = "<!-- table of scripts/figures/memory_table.py -->\n", "<!-- end of the table -->"
COLUMNS = ((100, None), (300, None), (300, "12GB"), (1000, None), (1000, "24GB"))


def table(rows: list[dict[str, Any]]) -> str:
    """One row a method: counted, and what was predicted; a dash where nothing was run."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    text = table(json.loads(ROWS.read_text()))
    if parser.parse_args().write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_program("memory_table", main))
