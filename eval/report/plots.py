"""Accuracy against speedup, one line per method, with the dense model as the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from geoaccel.eval.report.columns import three_digits
from geoaccel.eval.report.naming import differing_knobs, knobs_in_words, labels, ordered, settings
from geoaccel.eval.report.rows import Row
from geoaccel.eval.report.style import (
    DENSE,
    FAINT,
    INK,
    Look,
    Word,
    halo,
    literal,
    method_looks,
    new_figure,
    tidy,
    write_legend,
    write_words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 2
ACCURACY = {
    "auc_30": "AUC@30",
    "auc_5": "AUC@5",
    "fidelity_auc_30": "AUC@30 against dense",
    "fidelity_depth_abs_rel": "depth AbsRel against dense",
    "depth_abs_rel": "depth AbsRel",
    "chamfer": "chamfer distance",
    "ate_percent": "ATE (% of the path)",
}
SPEED = {"speedup": "speedup", "latency_ms": "latency (ms)"}


def plot_pareto(rows: Sequence[Row]) -> Figure | None:
    """Accuracy against speedup; without timings, or with a single row, each score on a separate scale.

    A line joins the rows of a method and its knobs over their ratios, or over their frame counts if each has one ratio.
    If both vary, each frame count gets separate panels, and so does each model, dtype, device or kernel.

    Returns:
        A figure; None if the rows have no scores, and no times at a single frame count either.
    """
    rows = ordered(rows)
    metrics = pick_metrics(rows)
    if not metrics:
        return None
    timed = any(row.number("speedup") is not None and not row.is_dense for row in rows)
    if timed and len(rows) > 1 and metrics[0] not in SPEED:
        return _plot_lines(rows, metrics)
    return _plot_dots(rows, metrics)


def pick_metrics(rows: Sequence[Row]) -> list[str]:
    """The most informative scores that some row has: two of accuracy, or else of speed.

    Speed over several frame counts is left to `plot_scaling`.
    """
    scores = [name for name in ACCURACY if _is_known(rows, name)]
    speed = [name for name in SPEED if _is_known(rows, name)]
    if len(rows) == 1:
        return scores[:PANELS] + speed[:1]
    return scores[:PANELS] or ([] if len({row.frames for row in rows}) > 1 else speed)


def _is_known(rows: Sequence[Row], name: str) -> bool:
    return any(row.number(name) is not None for row in rows)


def describe_metric(name: str) -> str:
    """Label of an axis."""
    better = "higher" if "auc" in name or name == "speedup" else "lower"
    return f"{(ACCURACY | SPEED)[name]} ({better} is better)"


def facets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By title, the rows that share a panel."""
    places = list(zip(settings(rows), (row.frames for row in rows), strict=True))
    counts = Counter((where, row.frames, row.method) for (where, _), row in zip(places, rows, strict=True))
    by_frames = max(counts.values()) > 1 and len({row.frames for row in rows}) > 1
    found: dict[str, list[Row]] = {}
    for (where, frames), row in zip(places, rows, strict=True):
        title = ", ".join(part for part in (where, f"{frames} frames" if by_frames else "") if part)
        found.setdefault(title, []).append(row)
    return found


def _plot_lines(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    style, groups = method_looks(rows), facets(rows)
    figure = new_figure(4.4 * len(metrics), 3.2 * len(groups) + 0.8)
    grid = figure.subplots(len(groups), len(metrics), squeeze=False, sharex=True, sharey="col")
    over_frames = any(len({row.frames for row in members}) > 1 for members in groups.values())
    words = {}
    for line, (title, members) in zip(grid, groups.items(), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            words[axes] = _draw_panel(axes, members, metric, style, over_frames)
            tidy(axes)
            axes.margins(0.1, 0.14)
            axes.set_title(literal(title), fontsize=10, color=INK, loc="left")
            axes.set_ylabel(describe_metric(metric), color=INK, fontsize=9.5)
            axes.xaxis.set_major_formatter("{x:g}x")
    for axes in grid[-1]:
        axes.set_xlabel("speedup over the dense model", color=INK, fontsize=9.5)
    drawn = any(row.is_dense and any(row.number(name) is not None for name in metrics) for row in rows)
    write_legend(figure, style, dense=DENSE if drawn else None, note=_note(rows, over_frames))
    figure.draw_without_rendering()
    for axes, beside in words.items():
        write_words(axes, beside)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], metric: str, style: dict[str, Look], over_frames: bool) -> list[Word]:
    """One score against speedup; returns the labels of the points."""
    words = []
    axes.axvline(1, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    dense = [(row, value) for row in rows if row.is_dense and (value := row.number(metric)) is not None]
    for row, value in dense:
        axes.plot([1], [value], DENSE.marker, color=DENSE.color, markersize=12, gid="dense", zorder=4)
        words.append(Word(1, value, f"{row.frames}" if over_frames else "dense", INK))
    if len(dense) == 1:
        axes.axhline(dense[0][1], color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    differ = differing_knobs(rows)
    curves: dict[tuple[str, str], list[tuple[float, float, Row]]] = {}
    for row in rows:
        speedup, value = row.number("speedup"), row.number(metric)
        if row.method in style and speedup is not None and value is not None:
            curves.setdefault((row.method, knobs_in_words(row, differ)), []).append((speedup, value, row))
    for (name, own), points in curves.items():
        look = style[name]
        xs, ys, _ = zip(*points, strict=True)
        axes.plot(xs, ys, marker=look.marker, color=look.color, linewidth=1.6, markersize=6, gid=name, zorder=3)
        words += [Word(x, y, _beside(row, own, over_frames), look.color) for x, y, row in points]
    return [word for word in words if word.text]


def _beside(row: Row, knobs: str, over_frames: bool) -> str:
    """Label that distinguishes a point from the others of its method."""
    if over_frames:
        return str(row.frames)
    removed = row.number("ratio")
    if removed is None and not knobs:
        removed = row.number("effective_ratio")
    return ", ".join(part for part in (knobs, "" if removed is None else f"{removed:.2g}") if part)


def _note(rows: Sequence[Row], over_frames: bool) -> str:
    """Notes below the plots."""
    methods = [row for row in rows if not row.is_dense]
    lines = []
    if over_frames:
        lines.append("point labels: frames")
    else:
        beside = ["knobs"] if any(differing_knobs(rows).values()) else []
        if any(row.number("ratio") is not None for row in methods):
            beside.append("requested ratio")
        elif not beside and any(row.number("effective_ratio") is not None for row in methods):
            beside.append("effective ratio")
        lines += [f"point labels: {', '.join(beside)}"] if beside else []
    named = zip(labels(rows), rows, strict=True)
    untimed = [name for name, row in named if row.number("speedup") is None and not row.is_dense]
    if untimed:
        lines.append(f"not timed: {'; '.join(untimed)}")
    return "\n".join(lines)


def _plot_dots(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Each configuration on a separate line."""
    style = method_looks(rows)
    named = labels(rows)
    beside = max(2.0, 0.5 + 0.075 * max(map(len, named)))
    figure = new_figure(beside + 3.2 * len(metrics), 0.3 * len(rows) + 1.1)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0], metrics, strict=True):
        points = [(y, row, value) for y, row in enumerate(rows) if (value := row.number(metric)) is not None]
        for y, row, value in points:
            look, size = (DENSE, 12) if row.is_dense else (style[row.method], 7)
            gid = "dense" if row.is_dense else row.method
            axes.plot([value], [y], look.marker, color=look.color, markersize=size, gid=gid, zorder=3)
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": look.color}
            axes.annotate(three_digits(value), (value, y), (8, 0), path_effects=halo(), **place).set_in_layout(False)
        dense = [value for _, row, value in points if row.is_dense]
        if len(dense) == 1 and len(rows) > 1:
            axes.axvline(dense[0], color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
        tidy(axes)
        axes.margins(x=0.2)
        if len(points) == 1:
            value = points[0][2]
            axes.set_xlim(min(0, 1.3 * value), max(1.15 if "auc" in metric else 1.3 * value, 1e-6))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [literal(label) for label in named])
        axes.set_xlabel(describe_metric(metric), color=INK, fontsize=9.5)
    return figure
