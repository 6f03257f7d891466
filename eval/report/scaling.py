"""Latency, speedup and peak memory over frame counts, one line per method, the dense model as the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from geoaccel.eval.report.naming import differing_knobs, knobs_in_words, ordered, settings
from geoaccel.eval.report.rows import Row
from geoaccel.eval.report.style import INK, Look, literal, method_looks, new_figure, tidy, write_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "latency_ms": "latency (ms)",
    "speedup": "speedup over the dense model",
    "peak_memory_gib": "peak memory (GiB)",
}
MAX_TICKS = 7
PALEST = 0.8


def plot_scaling(rows: Sequence[Row]) -> Figure | None:
    """Latency and peak memory (both axes logarithmic) and speedup over frame counts.

    Each model, dtype, device or kernel gets separate panels.

    Returns:
        A figure; None with fewer than two frame counts with latencies.
    """
    rows = ordered(rows)
    counts = sorted({row.frames for row in rows if row.number("latency_ms") is not None})
    if len(counts) < 2:
        return None
    shown = [name for name in PANELS if any(row.number(name) is not None for row in rows)]
    groups: dict[str, list[Row]] = {}
    for where, row in zip(settings(rows), rows, strict=True):
        groups.setdefault(where, []).append(row)
    figure = new_figure(3.7 * len(shown), 3.1 * len(groups) + 0.8)
    grid = figure.subplots(len(groups), len(shown), squeeze=False)
    style, shades = method_looks(rows), False
    entries: dict[str, Look] = {}
    for line, (where, members) in zip(grid, groups.items(), strict=True):
        curves = method_curves(members)
        shades = shades or len(curves) > len({method for method, _, _ in curves})
        for axes, name in zip(line, shown, strict=True):
            _draw_dense(axes, members, name)
            for (method, label, paler), curve in curves.items():
                look = style[method].paler(paler)
                _draw_curve(axes, curve, name, look, label)
                by_knobs = any(differing_knobs(members)[method])
                entries.setdefault(label if by_knobs else method, look if by_knobs else style[method])
            axes.set_title(literal(where), fontsize=10, color=INK, loc="left")
            _finish(axes, name, counts)
    write_legend(figure, entries, dense=Look(INK, "*", "--"), note=_note(rows) if shades else "")
    return figure


def method_curves(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """Rows joined by a line, with their method, a unique label, and how pale they are drawn.

    A method run with several settings has a line for each, paler if it removes fewer tokens.

    Args:
        rows: In the order of `ordered`.
    """
    ways: dict[str, dict[tuple[float | None, str, int], list[Row]]] = {}
    count: Counter[tuple[str, float | None, str, int]] = Counter()
    differ = differing_knobs(rows)
    for row in rows:
        if not row.is_dense:
            own = knobs_in_words(row, differ)
            # Rows of older reports have no knobs: the n-th rows of all frame counts belong together.
            alike = (row.method, row.ratio, own, row.frames)
            ways.setdefault(row.method, {}).setdefault((row.ratio, own, count[alike]), []).append(row)
            count[alike] += 1
    curves = {}
    for method, found in ways.items():
        for i, (ratio, own, nth) in enumerate(sorted(found, key=lambda way: way[0] or 0)):
            label = method if ratio is None else f"{method}, ratio {ratio:g}"
            label += (f", {own}" if own else "") + (f" ({nth + 1})" if nth else "")
            curves[method, label, PALEST * (1 - (i + 1) / len(found))] = found[ratio, own, nth]
    return curves


def dense_points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """Measurements of the dense model: frame counts and values.

    From the dense model's own rows, or else from the first row measured together with it.
    """
    found: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: not row.is_dense):
        value = row.number(name if row.is_dense else f"dense_{name}")
        if value is not None:
            found.setdefault(row.frames, value)
    return sorted(found.items())


def _draw_dense(axes: Axes, rows: Sequence[Row], name: str) -> None:
    points = dense_points(rows, name)
    if name == "speedup":
        axes.axhline(1, color=INK, linewidth=1.2, linestyle="--", zorder=1, gid="dense")
    elif points:
        axes.plot(*zip(*points, strict=True), "--*", color=INK, linewidth=1.2, markersize=9, zorder=2, gid="dense")


def _draw_curve(axes: Axes, rows: Sequence[Row], name: str, look: Look, label: str) -> None:
    points = [(row.frames, value) for row in rows if (value := row.number(name)) is not None]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=look.color, marker=look.marker, linewidth=1.6, markersize=5, zorder=3, gid=label)


def _note(rows: Sequence[Row]) -> str:
    """Meaning of the shades, if the legend does not explain it."""
    if any(differing_knobs(rows).values()):
        return ""
    ratios = sorted({row.ratio for row in rows if row.ratio is not None and not row.is_dense})
    return "paler: fewer tokens removed" + (f" (ratio {', '.join(f'{ratio:g}' for ratio in ratios)})" if ratios else "")


def _finish(axes: Axes, name: str, counts: Sequence[int]) -> None:
    """Scales, ticks and labels of the axes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    if name == "speedup":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}x")
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 50:
            subs = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 5, 7)
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    tidy(axes)
    ticks = counts[:: -(-len(counts) // MAX_TICKS)]
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("frames", color=INK, fontsize=9.5)
    axes.set_ylabel(PANELS[name], color=INK, fontsize=9.5)
