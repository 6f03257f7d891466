"""docs/memory.md: the table is that of the rows beside it, and the commands are those that there are."""

from __future__ import annotations

import json
from pathlib import Path

import memory_table
from geoaccel.cli import parser

TEXT = memory_table.DOCUMENT.read_text()
ROWS = json.loads(memory_table.ROWS.read_text())


def test_the_table_shows_the_rows() -> None:
    shown = TEXT.partition(memory_table.BEGIN)[2].partition(memory_table.END)[0]
    assert shown == memory_table.table(ROWS), "run python scripts/figures/memory_table.py --write"


def test_what_was_predicted_is_close_and_limits_are_kept() -> None:
    for row in ROWS:
        assert abs(row["predicted_gib"] / row["peak_gib"] - 1) <= 0.1, row
        most = {"12GB": 10.0, "24GB": 22.0, None: float("inf")}[row["max_memory"]]
        assert row["peak_gib"] <= most, row


def test_the_commands_are_taken() -> None:
    lines = [line.partition("#")[0] for line in TEXT.splitlines() if line.startswith("geoaccel reconstruct ")]
    assert len(lines) == 2
    for line in lines:
        parser().parse_args(line.split()[1:])
    assert Path("tests/device/memory_peaks.py").name in TEXT
