"""The plot of a sensitivity sweep: effects of every block alone, and of protecting some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from geoaccel.eval.report.style import FAINT, INK, new_figure, png, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALONE, CHOSEN = "#0072b2", "#d55e00"
TITLES = {
    "pose_deg": "cameras: angle to the dense output, degrees",
    "rotation_deg": "rotation to the dense output, degrees",
    "translation_deg": "translation to the dense output, degrees",
    "depth_rel": "depth: relative difference",
    "points": "points: distance over scene size",
    "auc_30_loss": "loss of AUC@30",
    "auc_5_loss": "loss of AUC@5",
}
PANELS = ("depth_rel", "points")


def sensitivity_plot(document: Mapping[str, Any]) -> bytes:
    """PNG of a document of :func:`geoaccel.eval.tools.sensitivity.measure_sensitivity`.

    Dots are means over scenes, bars 95 % intervals; protected blocks have another colour.
    """
    units, controls = document["units"], document["controls"]
    names = list(dict.fromkeys((document["rank_by"], *PANELS)))
    figure = new_figure(4.6 * len(names), 1.6 + 0.24 * (len(units) + len(controls)))
    axes = figure.subplots(2, len(names), squeeze=False, height_ratios=[len(units), max(3, len(controls))])
    protected = set(document["allocation"]["protected"])
    for column, name in enumerate(names):
        labels = [unit["name"] for unit in units] if column == 0 else None
        _dots(axes[0][column], units, name, labels, [unit["name"] in protected for unit in units])
        axes[0][column].set_title(TITLES[name], fontsize=10, color=INK)
        labels = [control["name"] for control in controls] if column == 0 else None
        chosen = [control["name"] == "protected by sensitivity" for control in controls]
        _dots(axes[1][column], controls, name, labels, chosen)
    axes[0][0].set_ylabel("quantized alone (red: protected)", color=INK)
    axes[1][0].set_ylabel("other scenes", color=INK)
    return png(figure)


def _dots(
    axes: Axes,
    entries: Sequence[Mapping[str, Any]],
    name: str,
    labels: Sequence[str] | None,
    marked: Sequence[bool],
) -> None:
    for row, (entry, mark) in enumerate(zip(entries, marked, strict=True)):
        found = entry["effects"][name]
        color = CHOSEN if mark else ALONE
        axes.plot([found["low"], found["high"]], [row, row], color=color, linewidth=1.5)
        axes.plot(found["mean"], row, "o", color=color, markersize=4)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(entries)), labels or [""] * len(entries))
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)  # five numbers fit next to each other
    tidy(axes)
