"""docs/backbones.md: the table is what the command prints, and the commands are those that there are."""

from __future__ import annotations

from pathlib import Path

from geoaccel.cli import parser
from geoaccel.info import describe_backbones

TEXT = Path(__file__).with_name("backbones.md").read_text()


def test_the_table_is_what_the_command_prints() -> None:
    assert describe_backbones() in TEXT


def test_the_commands_are_taken() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("geoaccel ")]
    assert len(lines) == 2
    for line in lines:
        parser().parse_args(line.split()[1:])
