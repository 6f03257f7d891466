"""A report as text: markdown, CSV, and a table for a terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import textwrap
from collections.abc import Iterable, Sequence

from geoaccel.eval.report.columns import Column, cell, columns
from geoaccel.eval.report.naming import SETTINGS, differing, labels, ordered, short_models
from geoaccel.eval.report.rows import BUSY, Report, Row

TERMINAL_WIDTH = 100
TERMINAL_LINES = 10


def facts(report: Report) -> list[tuple[str, str]]:
    """Settings common to all rows, and what they were measured on: name and text."""
    rows, shared = report.rows, [name for name in SETTINGS if name not in differing(report.rows)]
    found = [("model", short_models(rows)[rows[0].model])] if "model" in shared else []
    setup = [f"{rows[0].attention} attention"] if "attention" in shared and rows[0].attention != "none" else []
    setup += [getattr(rows[0], name) for name in ("dtype", "device") if name in shared]
    found.append(("setup", ", ".join(setup)))
    for name in ("scenes", "frames"):
        values = sorted({getattr(row, name) for row in rows} - {0})
        found.append((name, ", ".join(map(str, values))))
    found.append(("protocol", report.protocol))
    if (varied := max((row.spread or 0 for row in rows), default=0)) > BUSY:
        found.append(("note", f"times varied by {100 * varied:.0f} %: the machine was busy, and speedups are rough"))
    found.append(("hardware", _distinct(row.hardware for row in rows)))
    found.append(("versions", _distinct(versions(row) for row in rows)))
    found.append(("made", report.made))
    return [(name, text) for name, text in found if text]


def versions(row: Row) -> str:
    """Packages and their versions in words."""
    return ", ".join(f"{name} {version}" for name, version in row.versions.items())


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def commands(report: Report) -> list[str]:
    """The commands that were run, each once."""
    return list(dict.fromkeys(row.command for row in report.rows if row.command))


def left_out(rows: Sequence[Row], kind: str) -> list[str]:
    """Scenes without scores and the reason, each once, with the configurations concerned if not all.

    Args:
        rows: Rows of the report.
        kind: ``skipped`` or ``failed``.
    """
    concerned: dict[str, list[str]] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        for entry in dict.fromkeys(row.skipped if kind == "skipped" else row.failures):
            concerned.setdefault(entry, []).append(label)
    return [
        entry if len(found) == len(rows) else f"{entry} (in {'; '.join(found)})" for entry, found in concerned.items()
    ]


def markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The report as a markdown document.

    Args:
        report: What to write.
        plots: File names of its figures.
    """
    rows = ordered(report.rows)
    shown = columns(rows)
    lines = [f"# {escape_markdown(report.title)}", ""]
    lines.append("| " + " | ".join(escape_markdown(column.header) for column in shown) + " |")
    lines.append("|" + "|".join("---:" if column.is_number else "---" for column in shown) + "|")
    for row in rows:
        cells = (escape_markdown(cell(column.name, column.get(row), missing="-")) for column in shown)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {escape_markdown(text)}" for name, text in facts(report))]
    lines += ["", "; ".join(f"{column.header}: {column.about}" for column in shown if column.about) + "."]
    for command in commands(report):
        lines += ["", *(f"    {line}" for line in command.splitlines())]
    for name in plots:
        lines += ["", f"![{name}]({name})"]
    for kind in ("skipped", "failed"):
        entries = left_out(rows, kind)
        if entries:
            lines += ["", f"## {kind.capitalize()} ({len(entries)})", ""]
            lines += [f"- {escape_markdown(entry)}" for entry in entries]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text escaped for markdown, on one line."""
    return re.sub(r"[\\`*|<>\[\]]", r"\\\g<0>", " ".join(text.split()))


def to_csv(report: Report) -> str:
    """One line per row, with every score and setting, in full precision; empty if there is no value."""
    words = ("knobs", "hardware", "versions", "command", "skipped", "failed")
    numbers = [field.name for field in dataclasses.fields(Row) if field.name not in ("scores", "per_scene", *words)]
    scores = list(dict.fromkeys(name for row in report.rows for name in row.scores))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*numbers, *scores, *words])
    for row in report.rows:
        fields = [row.number(name) if name not in TEXT_FIELDS else _as_text(getattr(row, name)) for name in numbers]
        knobs = ", ".join(f"{name}={value}" for name, value in row.knobs.items())
        about = (knobs, row.hardware, versions(row), row.command, "; ".join(row.skipped), "; ".join(row.failures))
        writer.writerow([*fields, *map(row.number, scores), *map(_as_text, about)])
    return text.getvalue()


TEXT_FIELDS = ("model", "merging", "quantization", "attention", "dtype", "device")


def _as_text(value: str) -> str:
    """Escape text that a spreadsheet would run as a formula: names come from users' folders."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def terminal_table(report: Report) -> str:
    """The report as plain text, at most `TERMINAL_WIDTH` wide if possible."""
    rows = ordered(report.rows)
    every = columns(rows)
    shown = _fitting(every, rows)
    lines = ["", report.title, "", *_aligned(shown, rows), ""]
    missing = [" ".join(column.header.split()) for column in every if column not in shown]
    if missing:
        lines += textwrap.wrap(f"for lack of space only in report.md: {', '.join(missing)}", TERMINAL_WIDTH)
    for name, text in facts(report):
        lines += textwrap.wrap(f"{name}: {text}", TERMINAL_WIDTH, subsequent_indent="  ")
    for kind in ("skipped", "failed"):
        entries = left_out(rows, kind)
        if entries:
            lines.append(f"{kind} ({len(entries)}):")
            lines += [f"  {entry}" for entry in entries[:TERMINAL_LINES]]
        if len(entries) > TERMINAL_LINES:
            lines.append(f"  and {len(entries) - TERMINAL_LINES} more, see report.md")
    return "\n".join(_printable(line) for line in lines)


def _fitting(shown: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Leave out columns until the table fits, the least important first."""
    kept = list(shown)
    while max(map(len, _aligned(kept, rows))) > TERMINAL_WIDTH and any(column.spare for column in kept):
        kept.remove(max(reversed(kept), key=lambda column: column.spare))
    return kept


def _aligned(shown: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Lines of a table: headers broken at spaces, text to the left, numbers to the right."""
    headers = [column.header.split() for column in shown]
    height = max(map(len, headers))
    stacked = [(height - len(words)) * [""] + words for words in headers]
    cells = [[cell(column.name, column.get(row), missing="-") for column in shown] for row in rows]
    widths = [max(map(len, [*headers[c], *(line[c] for line in cells)])) for c in range(len(shown))]
    lines = [[words[level] for words in stacked] for level in range(height)]
    lines += [["-" * width for width in widths], *cells]
    texts = []
    for line in lines:
        pairs = zip(shown, line, widths, strict=True)
        texts.append("  ".join(word.rjust(w) if c.is_number else word.ljust(w) for c, word, w in pairs).rstrip())
    return texts


def _printable(line: str) -> str:
    """Replace control characters: names come from users' folders and go to the terminal."""
    return "".join(c if c.isprintable() else "?" for c in line)
