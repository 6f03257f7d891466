"""The drawing of docs/architecture.md: floors and packages, and their imports, from the code.

python scripts/figures/architecture.py            # prints what imports what, floor by floor
python scripts/figures/architecture.py --write    # and makes docs/architecture.svg

Floors and packages are the table of tests/test_layering.py; imports are read from the sources.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from geoaccel.atomic import write_text
from geoaccel.errors import run_program
from geoaccel.eval.report.style import FAINT, INK
from table_parts import ROOT

TABLE, DRAWING = ROOT / "tests" / "test_layering.py", ROOT / "docs" / "architecture.svg"
WIDTH, LEFT, RIGHT, CELL = 800, 16, 560, 36
"""Pixels: of the drawing, where boxes begin and end, and of a column of counts."""

FONT, LETTER, BOX, TITLE = 12, 7.3, 24, 26
"""Pixels: size of letters, width of one, height of a box and of a floor's title."""

GAP, WRAP = 10, 3
"""Pixels between boxes, and between the lines of one row."""

PAPERS = ("#eef2f7", "#e8f1ee", "#f6f1e6", "#f4ebee", "#ecebf6", "#eef3e7")
"""Of the floors."""


@dataclass(frozen=True)
class Floor:
    """One floor.

    Attributes:
        number: From 0, the ground.
        title: What belongs there.
        rows: From the ground up; packages of a row do not import each other, but where one entry names several, each
            may import those to its left.
    """

    number: int
    title: str
    rows: list[list[list[str]]]


@dataclass(frozen=True)
class House:
    """What is drawn.

    Attributes:
        floors: From the ground up.
        imports: Floor of the importer and of what it imports to the number of pairs of packages.
    """

    floors: list[Floor]
    imports: Counter[tuple[int, int]]


def house(table: Path = TABLE) -> House:
    """Read the table of floors, and what imports what."""
    layering: dict[str, Any] = runpy.run_path(str(table))
    floors: list[Floor] = []
    titles = iter(titled_rows(table.read_text()))
    for row, title in zip(layering["ROWS"], titles, strict=True):
        if title is not None:
            floors.append(Floor(len(floors), title, []))
        floors[-1].rows.append([entry.split() for entry in row])
    on = {name: floor.number for floor in floors for row in floor.rows for entry in row for name in entry}
    modules = layering["graph"](layering["SOURCES"])
    package_of = layering["package_of"]
    pairs = {(package_of(module), package_of(target)) for module, targets in modules.items() for target in targets}
    known = ((on[own], on[other]) for own, other in pairs if own != other and other is not None)
    return House(floors, Counter(known))


def titled_rows(text: str) -> Iterator[str | None]:
    """For each row of the table, the title of the floor that begins with it, or None."""
    lines = text.partition("\nROWS = (\n")[2].partition("\n)\n")[0].splitlines()
    title = None
    for line in lines:
        if found := re.fullmatch(r"    # floor \d: (.*)", line):
            title = found[1]
        elif re.match(r"    \(", line):
            yield title
            title = None


def drawing(built: House) -> str:
    """The house as SVG."""
    parts: list[str] = []
    y = 44.0
    numbers = [floor.number for floor in built.floors]
    middle = RIGHT + 10 + CELL * len(numbers) / 2
    parts.append(label(middle, 16, "imports packages of floor", FAINT, "middle"))
    for number in numbers:
        parts.append(label(column(number), 34, str(number), INK, "middle", bold=True))
    for floor in reversed(built.floors):
        boxes, height = laid_out(floor, y + TITLE)
        height += TITLE + GAP
        parts.append(rectangle(4, y, WIDTH - 8, height, PAPERS[floor.number % len(PAPERS)], "none", 6))
        title = f"floor {floor.number}: {floor.title}"
        parts += [label(LEFT, y + 18, title, INK, bold=True), *boxes]
        for number in numbers:
            if count := built.imports[floor.number, number]:
                parts.append(label(column(number), y + height / 2 + 5, str(count), INK, "middle"))
        y += height + 6
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" font-size="{FONT}"'
    sans = "font-family=\"Inter, 'DejaVu Sans', Arial, sans-serif\""
    paper = rectangle(0, 0, WIDTH, y, "#ffffff", "none", 0)
    return (
        "\n".join([f"{head} {sans}>", "<title>Floors and packages of geoaccel</title>", paper, *parts, "</svg>"]) + "\n"
    )


def column(number: int) -> float:
    """Where the counts of a floor stand."""
    return RIGHT + 10 + CELL * (number + 0.5)


def laid_out(floor: Floor, top: float) -> tuple[list[str], float]:
    """The boxes of a floor, highest row first, and the height that they take."""
    parts: list[str] = []
    y = top
    for row in reversed(floor.rows):
        x = float(LEFT)
        for entry in row:
            widths = [len(name) * LETTER + 14 for name in entry]
            if x > LEFT and x + sum(widths) > RIGHT:
                x, y = float(LEFT), y + BOX + WRAP
            first, room = True, x
            for name, width in zip(entry, widths, strict=True):
                if not first and room + width > RIGHT:
                    room, y = float(LEFT) + 20, y + BOX + WRAP
                parts.append(rectangle(room, y, width, BOX, "#ffffff", FAINT, 3))
                parts.append(label(room + width / 2, y + 16, name, INK, "middle"))
                first, room = False, room + width
            x = room + GAP
        y += BOX + GAP
    return parts, y - top


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: int) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}"/>'


def label(x: float, y: float, text: str, colour: str, anchor: str = "start", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the drawing")
    write = parser.parse_args().write
    built = house()
    for floor in built.floors:
        below = {f"floor {other}": n for (own, other), n in sorted(built.imports.items()) if own == floor.number}
        print(
            f"floor {floor.number}: {sum(len(entry) for row in floor.rows for entry in row)} packages; imports {below}"
        )
    if write:
        write_text(DRAWING, drawing(built))


if __name__ == "__main__":
    sys.exit(run_program("architecture", main))
