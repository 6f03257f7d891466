"""`make docs-check`: the drawing of docs/architecture.md is that of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

import architecture


@pytest.fixture(scope="module")
def house() -> architecture.House:
    return architecture.house()


def test_the_drawing_is_up_to_date(house: architecture.House) -> None:
    assert architecture.DRAWING.read_text() == architecture.drawing(house), (
        "run python scripts/figures/architecture.py --write"
    )
    assert f"]({architecture.DRAWING.name})" in (architecture.ROOT / "docs" / "architecture.md").read_text()


def test_every_package_and_no_import_upward_is_drawn(house: architecture.House) -> None:
    svg = architecture.DRAWING.read_text()
    names = [name for floor in house.floors for row in floor.rows for entry in row for name in entry]
    assert len(names) == len(set(names)) > 60
    assert all(f">{name}</text>" in svg for name in names)
    assert [floor.number for floor in house.floors] == list(range(6))
    assert all(floor.title in svg for floor in house.floors)
    assert house.imports
    assert all(own >= other for own, other in house.imports)


def test_another_table_is_drawn_as_it_is(house: architecture.House, tmp_path: Path) -> None:
    table = tmp_path / "tests" / "test_layering.py"
    table.parent.mkdir()
    for folder in ("geoaccel", "models", "eval", "configs"):
        (tmp_path / folder).symlink_to(architecture.ROOT / folder)
    table.write_text(architecture.TABLE.read_text().replace("# floor 4: measuring", "# floor 4: weighing"))
    changed = architecture.house(table)
    assert [floor.title for floor in changed.floors][4] == "weighing"
    assert changed.imports == house.imports
