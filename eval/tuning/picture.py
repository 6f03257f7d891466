"""Figure of a tuning: layers across, choices down, the error of each alone as colour, the plan marked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from geoaccel.eval.report.style import FAINT, INK, new_figure, png

LABELS = {
    "pose_deg": "cameras: median angle to the dense output, degrees (in that layer alone)",
    "depth_rel": "depth: mean relative difference to the dense output (in that layer alone)",
}
MARK = "#d55e00"
WRITTEN_TO = 16  # more layers have no room for numbers


def picture(document: Mapping[str, Any]) -> bytes:
    """PNG of a document of :func:`geoaccel.eval.tuning.report.document`: one panel for each error that is limited."""
    from matplotlib.patches import Rectangle

    alone, work, layers = document["alone"], document["predicted_s"]["layers"], document["layers"]
    names, depth = list(alone[0]), len(alone)
    limited = [name for name in LABELS if document["budget"][name] is not None] or list(LABELS)[:1]
    width = max(6.0, 2.6 + 0.62 * depth)
    figure = new_figure(width, (1.3 + 0.36 * len(names)) * len(limited) + 0.5)
    panels = figure.subplots(len(limited), 1, squeeze=False)[:, 0]
    for axes, error in zip(panels, limited, strict=True):
        values = np.array([[row[name][error] for row in alone] for name in names])
        shown = np.where(values > 0, values, np.nan)
        image = axes.imshow(shown, aspect="auto", cmap="viridis_r", norm=_scale(shown))
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.outline.set_visible(False)
        for row, name in enumerate(names):
            for layer in range(depth):
                slower = name != "dense" and work[layer][name] >= work[layer]["dense"]
                text = "slower" if slower else _short(values[row, layer], error)
                if depth <= WRITTEN_TO:
                    dark = math.isfinite(values[row, layer]) and image.norm(values[row, layer]) > 0.55
                    color = "white" if dark and values[row, layer] > 0 else INK
                    axes.text(layer, row, text, ha="center", va="center", fontsize=7, color=color)
                elif slower:
                    axes.plot(layer, row, "x", color=FAINT, markersize=4)
        for entry in layers:
            corner = (entry["layer"] - 0.5, names.index(entry["chosen"]) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=2.2, clip_on=False))
        axes.set_xticks(range(depth), [str(layer) for layer in range(depth)])
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(colors=INK, labelsize=9, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(LABELS[error], fontsize=9, color=INK, loc="left")
    panels[-1].set_xlabel("layer of global attention (framed: the plan)", fontsize=9, color=INK)
    return png(figure)


def _scale(values: np.ndarray) -> Any:
    """A logarithmic colour scale over the values."""
    from matplotlib.colors import LogNorm

    there = values[np.isfinite(values)]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.1, 1.0)
    return LogNorm(low, max(high, 1.01 * low))


def _short(value: float, error: str) -> str:
    if not math.isfinite(value):
        return "NaN"
    return f"{100 * value:.2g}%" if error == "depth_rel" else f"{value:.2g}"
