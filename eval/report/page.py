"""A report as one self-contained HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from geoaccel.eval.report.assets import CSS, SCRIPT
from geoaccel.eval.report.columns import NUMBER_COLUMNS, TRAJECTORY_COLUMNS, cell, columns
from geoaccel.eval.report.naming import differing, labels, ordered
from geoaccel.eval.report.paths import PREFIX
from geoaccel.eval.report.rows import Report, Row
from geoaccel.eval.report.tables import commands, facts, left_out, versions

# The page may run its own script and show its own images, and load nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PLOT_TITLES = {"pareto.png": "Accuracy and speedup", "scaling.png": "Time and memory over frames"}
SCENE_HEADERS = {name: header for name, header, _, _ in (*NUMBER_COLUMNS, *TRAJECTORY_COLUMNS)}
SCENE_HEADERS |= {"conf_spearman": "conf. rank correlation"}
SCENE_SCORES = (
    *("auc_30", "auc_5", "auc_3", "depth_abs_rel", "chamfer", "conf_spearman"),
    *(name for name, *_ in TRAJECTORY_COLUMNS),
    *("fidelity_auc_30", "fidelity_rotation_deg", "fidelity_depth_abs_rel", "fidelity_point_distance"),
)


def html_page(report: Report, plots: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        report: What to show.
        plots: File name to the bytes of a PNG.
    """
    rows = ordered(report.rows)
    known = dict(facts(report))
    counts = [f"{known[name]} {name}" for name in ("scenes", "frames") if name in known]
    lead = [*(known[name] for name in ("model", "hardware", "made") if name in known), *counts]
    parts = [f"<h1>{escape(report.title)}</h1>", f'<p class="lead soft">{escape(", ".join(lead))}</p>']
    parts.append(_summary_table(rows))
    parts += [_plot(name, picture) for name, picture in plots.items()]
    parts.append("<h2>How it was measured</h2>")
    parts.append(f'<div class="card"><dl>{_pairs(facts(report))}</dl></div>')
    parts += [_command(command) for command in commands(report)]
    for kind in ("failed", "skipped"):
        entries = left_out(rows, kind)
        if entries:
            items = "".join(f"<li>{escape(entry)}</li>" for entry in entries)
            parts.append(f'<h2>{kind.capitalize()} ({len(entries)})</h2><div class="card"><ul>{items}</ul></div>')
    parts.append("<h2>Configurations</h2>")
    parts += [_configuration(row, label, rows) for row, label in zip(rows, labels(rows), strict=True)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _plot(name: str, picture: bytes) -> str:
    title = PLOT_TITLES.get(name, name)
    if name.startswith(PREFIX):
        title = f"Path of {name.removeprefix(PREFIX).removesuffix('.png')}"
    data = base64.b64encode(picture).decode("ascii")
    return (
        f'<h2>{escape(title)}</h2><figure class="card">'
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)


def _command(command: str) -> str:
    return f'<pre class="card"><code>{escape(command)}</code></pre>'


def _summary_table(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    heads = [(column.header, column.about, column.is_number) for column in shown]
    lines = []
    for row in rows:
        cells = "".join(_cell(column.name, column.get(row), number=column.is_number) for column in shown)
        lines.append(f"<tr{' class=dense' if row.is_dense else ''}>{cells}</tr>")
    about = _pairs((column.header, column.about) for column in shown if column.about)
    legend = f'<details class="legend soft"><summary>What the columns mean</summary><dl>{about}</dl></details>'
    return _table(heads, lines) + (legend if about else "")


def _table(heads: Iterable[tuple[str, str, bool]], lines: Iterable[str], around: str = "card scroll") -> str:
    """A sortable table: header, explanation, whether it is a number; and its rows."""
    cells = "".join(
        f'<th{"" if number else " class=text"} title="{escape(about)}"><button>{escape(header)}</button></th>'
        for header, about, number in heads
    )
    return (
        f'<div class="{around}"><table><thead><tr>{cells}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cell(name: str, value: object, *, number: bool = True, bar: bool = False) -> str:
    """One cell; `data-value` is the sort key."""
    text = cell(name, value, missing="")
    if not text:
        return '<td class="missing">&ndash;</td>'
    if not number:
        return f'<td class="text" title="{escape(text)}" data-value="{escape(text)}">{escape(text)}</td>'
    style = ""
    if bar and isinstance(value, int | float):
        style = f' class="bar" style="--share:{100 * min(max(value, 0), 1):.1f}%"'
    return f'<td{style} data-value="{escape(str(value))}">{escape(text)}</td>'


def _configuration(row: Row, label: str, rows: Sequence[Row]) -> str:
    """Details of one row, collapsed."""
    auc = cell("auc_30", row.number("auc_30"), missing="")
    notes = [f"AUC@30 {auc}" if auc else "", f"{row.scenes} scenes" if row.scenes else ""]
    notes.append(f"{len(row.failures)} failed" if row.failures else "")
    summary = f"<summary>{escape(label)} <small>{', '.join(note for note in notes if note)}</small></summary>"
    parts = [summary]
    if "hardware" in differing(rows) or len({versions(other) for other in rows}) > 1:
        parts.append(f"<dl>{_pairs([('hardware', row.hardware), ('versions', versions(row))])}</dl>")
    if len({other.command for other in rows}) > 1 and row.command:
        parts.append(f"<pre><code>{escape(row.command)}</code></pre>")
    if row.per_scene:
        parts.append(_scene_table(row))
    if row.scores:
        scores = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(cell(name, value, missing='-'))}</dd></div>"
            for name, value in row.scores.items()
        )
        parts.append(f"<details><summary>All scores</summary><dl class=scores>{scores}</dl></details>")
    return f'<details class="card">{"".join(parts)}</details>'


def _scene_table(row: Row) -> str:
    """One line per scene; those without scores give the reason."""
    measured = {name for entry in row.per_scene for name, value in entry.items() if _is_finite(value)}
    scores = [name for name in SCENE_SCORES if name in measured]
    words = ["scene", *(["category"] if any(entry.get("category") for entry in row.per_scene) else [])]
    heads = [(name, "", False) for name in words] + [("frames", "", True)]
    heads += [(SCENE_HEADERS[name], "", True) for name in scores]
    lines = []
    for entry in row.per_scene:
        if "failed" in entry:
            reason = f'<td class="failed" colspan="{len(heads) - 1}">failed: {escape(str(entry["failed"]))}</td>'
            lines.append(f"<tr>{_cell('scene', entry.get('scene'), number=False)}{reason}</tr>")
            continue
        cells = [_cell(name, entry.get(name), number=False) for name in words]
        cells.append(_cell("frames", entry.get("frames")))
        cells += [_cell(name, entry.get(name), bar=name == "auc_30") for name in scores]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _table(heads, lines, "scroll")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
