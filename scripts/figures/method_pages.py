"""The tables of docs/methods/: knobs and differences from the paper, from the docstrings, and measurements.

python scripts/figures/method_pages.py            # prints them
python scripts/figures/method_pages.py --write    # puts them into the documents

The text around them is written by hand; `scripts/figures/token_pictures.py` makes the figures. Frame counts are those
in benchmarks/merging-*-frames-report.json.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import many_frames_tables
from geoaccel.atomic import write_text
from geoaccel.errors import UserError, run_program
from geoaccel.merging import MERGING
from merging_tables import cost
from table_parts import MODELS, ROOT, read, table

FOLDER = ROOT / "docs" / "methods"
ORDER = ("asymmetric", "alike", "httm", "litevggt", "fastvggt", "come", "avggt")
EVERYWHERE = ("bypass", "min_gain")
"""Knobs of every method, which come last."""

SCORES = ("auc_30", "auc_5")
FEWEST = 2
"""Scenes that an interval needs."""

BEGIN, END = "<!-- {} of scripts/figures/method_pages.py -->\n", "<!-- end of {} -->"
ROLE = re.compile(r":[a-z]+:(?=`)")


def knobs(name: str) -> list[str]:
    """Table: every knob, its default, and what it does."""
    method: Any = MERGING[name]
    own = method()
    said = {knob: text for base in reversed(method.__mro__) for knob, text in attributes(base)}
    kinds = {knob: str(field.type) for knob, field in method.__dataclass_fields__.items()}
    taken = [knob for knob, kind in kinds.items() if "ClassVar" not in kind]
    rows = []
    for knob in sorted(taken, key=EVERYWHERE.__contains__):
        value = None if "InitVar" in kinds[knob] else getattr(own, knob)
        rows.append((f"`{knob}`", f"`{value!r}`".replace("'", '"'), cell(said[knob])))
    return table(("knob", "default", "what it does"), rows)


def attributes(cls: type) -> Iterator[tuple[str, str]]:
    """Names and texts listed in a docstring under ``Attributes``."""
    for entry in items(cls, "Attributes:", r"\w+: "):
        name, _, text = entry.partition(": ")
        yield name, text


def differs(name: str) -> list[str]:
    """List: differences of a method from its paper, from its docstring."""
    return [f"- {cell(entry.removeprefix('- '))}" for entry in items(MERGING[name], "Differs from the paper in:", "- ")]


def items(cls: Any, title: str, start: str) -> list[str]:
    """The entries of one section of a docstring, each on one line.

    Args:
        cls: Class with the docstring.
        title: Title of the section.
        start: Regular expression for the start of an entry, indented by four spaces more than the title.
    """
    found: list[str] = []
    lines = iter(inspect.cleandoc(cls.__doc__ or "").splitlines())
    if title not in lines:  # which reads on until it is there
        return found
    for line in lines:
        if line and not line.startswith("    "):
            break
        if re.match(start, text := line[4:]):
            found.append(text.strip())
        elif text.strip():
            found[-1] += f" {text.strip()}"
    return found


def cell(text: str) -> str:
    """Text of a docstring as markdown."""
    return ROLE.sub("", text).replace("``", "`").replace("|", "\\|")


def evidence(name: str) -> list[str]:
    """Table: cost and savings of a method at every measured frame count."""
    documents = read("merging-{}-frames-report.json")
    header = ["frames (scenes)"]
    for model in MODELS:
        header += [f"`{model}`: AUC@30", "AUC@5", "speedup"]
    counts = sorted({int(count) for document in documents.values() for count in document["frames"]})
    rows = []
    for count in counts:
        row: list[str] = []
        scenes = set()
        for document in documents.values():
            found = {one["variant"]: one for one in document["frames"].get(str(count), ())}
            if name not in found or found[name]["scenes"] < FEWEST:
                row += ["-"] * 3
                continue
            own, dense = found[name], found["dense"]
            scenes.add(str(own["scenes"]))
            changes = cost(own["effects"], strictest=True)[:2]
            row += [f"{change} of {dense[key]:.3f}" for change, key in zip(changes, SCORES, strict=True)]
            row.append(f"{own['effects']['speedup']['mean']:.2f}x")
        if scenes:
            rows.append([f"{count} ({' and '.join(sorted(scenes))})", *row])
    return table(header, rows)


PARTS = {
    "knobs": knobs,
    "differences": differs,
    "evidence": evidence,
    "many frames": many_frames_tables.many_frames,
    "more scenes": many_frames_tables.more_scenes,
    "counted frames": many_frames_tables.counted_frames,
}


def parts(name: str) -> dict[str, str]:
    """The generated parts of a page, by the name of their markers."""
    made = {part: make(name) for part, make in PARTS.items()}
    return {part: "\n".join(lines) + "\n" for part, lines in made.items() if lines}


def shown(text: str, part: str) -> str:
    """The text between two markers of a page.

    Raises:
        UserError: If it has no such markers.
    """
    _, begin, rest = text.partition(BEGIN.format(part))
    found, end, _ = rest.partition(END.format(part))
    if not (begin and end):
        raise UserError(f"the page has no markers for its {part}: {BEGIN.format(part).strip()} and {END.format(part)}")
    return found


def filled(text: str, part: str, lines: str) -> str:
    """A page with other text between its markers."""
    begin, end = BEGIN.format(part), END.format(part)
    return text.replace(begin + shown(text, part) + end, begin + lines + end)


def page(name: str) -> Path:
    """Of a method."""
    return FOLDER / f"{name}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into the documents")
    write = parser.parse_args().write
    for name in ORDER:
        text = page(name).read_text()
        for part, lines in parts(name).items():
            print(f"## {name}: {part}\n\n{lines}")
            text = filled(text, part, lines)
        if write:
            write_text(page(name), text)


if __name__ == "__main__":
    sys.exit(run_program("method_pages", main))
