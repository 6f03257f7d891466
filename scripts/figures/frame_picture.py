"""Figure of the cost and savings of merging: accuracy kept against speedup, one panel per frame count."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from geoaccel.eval.report.style import DENSE as DENSE_LOOK
from geoaccel.eval.report.style import FAINT, INK, Look, looks, new_figure, tidy, write_legend
from merging_variants import DENSE, FREE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3


def picture(found: dict[str, Any]) -> Figure:
    """Fraction of the dense model's accuracy that a method keeps, over its speedup.

    The dense model is at 1 and 100 %. A filled mark is AUC@30 with its 95 % interval over scenes, a hollow one AUC@5. A
    dashed line is the speedup with free global attention, if measured.

    Args:
        found: A document of :func:`frame_tables.document`.
    """
    counts = found["frames"]
    names = (row["variant"] for rows in counts.values() for row in rows if row["variant"] not in (DENSE, FREE))
    style = {name: replace(look, dash="none") for name, look in looks(names).items()}
    columns = min(COLUMNS, len(counts))
    height = -(-len(counts) // columns)
    figure = new_figure(max(4.0 * columns, 6.5), 3.3 * height + 0.9)
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    for axes, (frames, rows) in zip(panels, counts.items(), strict=False):
        draw(axes, rows, style)
        axes.set_title(f"{frames} frames", fontsize=10, color=INK, loc="left")
    for axes in panels[len(counts) :]:
        axes.remove()
    for i, axes in enumerate(panels[: len(counts)]):
        if i % columns == 0:
            axes.set_ylabel("share of the dense AUC kept", color=INK, fontsize=9.5)
        if i + columns >= len(counts):
            axes.set_xlabel("speedup over the dense model", color=INK, fontsize=9.5)
    note = f"{found['model']}, {found['set']} scenes. Filled: AUC@30 with 95 % intervals over scenes; hollow: AUC@5"
    if any(row["variant"] == FREE for rows in counts.values() for row in rows):
        note += "; dashed: a global attention of no cost"
    write_legend(figure, style, dense=DENSE_LOOK, note=note)
    return figure


def draw(axes: Axes, rows: list[dict[str, Any]], style: dict[str, Look]) -> None:
    """One frame count."""
    dense = next(row for row in rows if row["variant"] == DENSE)
    axes.axhline(100, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    axes.axvline(1, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    axes.plot([1], [100], DENSE_LOOK.marker, color=DENSE_LOOK.color, markersize=12, gid="dense", zorder=4)
    for row in rows:
        if row is dense:
            continue
        effects = row["effects"]
        speedup = effects["speedup"]["mean"]
        if row["variant"] == FREE:
            axes.axvline(speedup, color=FAINT, linewidth=1.2, linestyle="--", zorder=1, gid=FREE)
            continue
        look = style[row["variant"]]
        kept = {}
        for degrees in (30, 5):
            loss, before = effects[f"auc_{degrees}_loss"], dense[f"auc_{degrees}"]
            known = [loss[key] for key in ("mean", "high", "low") if loss[key] is not None]
            kept[degrees] = [100 * (1 - value / before) if before else 0.0 for value in known]
        mean, *bounds = kept[30]
        if bounds:
            axes.plot([speedup, speedup], bounds, color=look.color, linewidth=1.2, zorder=2)
        axes.plot([speedup], [mean], look.marker, color=look.color, markersize=7, gid=row["variant"], zorder=3)
        strict = kept[5][0]
        axes.plot([speedup, speedup], [mean, strict], color=look.color, linewidth=0.8, linestyle=":", zorder=2)
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": look.color, "markersize": 6}
        axes.plot([speedup], [strict], look.marker, zorder=3, gid=f"{row['variant']}, AUC@5", **hollow)
    tidy(axes)
    axes.margins(0.1, 0.12)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_major_formatter("{x:g} %")
