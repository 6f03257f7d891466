"""docs/memory.md: the table is that of the rows beside it, and the commands are those that there are."""

from __future__ import annotations

import json
from pathlib import Path

import memory_table
from geoaccel.cli import parser

TEXT = memory_table.DOCUMENT.read_text()
ROWS = json.loads(memory_table.ROWS.read_text())


def test_the_tables_show_the_rows() -> None:
    for begin, text in memory_table.tables().items():
        shown = TEXT.partition(begin)[2].partition(memory_table.END)[0]
        assert shown == text, "run python scripts/figures/memory_table.py --write"


def test_a_plan_keeps_to_what_is_predicted_on_a_cpu() -> None:
    rows = json.loads(memory_table.RESIDENT.read_text())
    whole = {row["model"]: row["outputs"] for row in rows if row["plan"] is None}
    planned = [row for row in rows if row["plan"] is not None]
    assert len(planned) == 6
    for row in planned:
        assert row["outputs"] == whole[row["model"]], row
        if row["model"] == "vggt-mini":
            assert abs(row["resident_mib"] / row["predicted_mib"] - 1) <= 0.15, row


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
