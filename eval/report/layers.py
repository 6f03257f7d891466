"""Plot of the deviation of an accelerated model from the dense one, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geoaccel.eval.report.style import FAINT, INK, literal, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour each; in the order of a forward.
KINDS = {"encoder": "#0072b2", "frame": "#e69f00", "global": "#d55e00"}


def plot_layers(found: Mapping[str, Any]) -> Figure:
    """Distance from the dense tokens after every block: 1 minus the cosine, mean and worst token."""
    figure = new_figure(7.2, 3.4)
    axes = figure.subplots()
    rows = list(enumerate(found["layers"]))
    for kind, color in KINDS.items():
        own = [(place, row) for place, row in rows if row["kind"] == kind]
        for statistic, look in (("mean", {"marker": "o"}), ("min", {"marker": "v", "alpha": 0.45})):
            name = f"{kind}, {'mean' if statistic == 'mean' else 'worst token'}"
            values = [1 - row[f"fidelity_cosine_{statistic}"] for _, row in own]
            axes.plot(
                [place for place, _ in own], values, color=color, linestyle="none", markersize=4.5, label=name, **look
            )
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    axes.set_xlabel("block, in the order of the forward", color=INK, fontsize=9.5)
    axes.set_ylabel("1 - cosine to the dense token", color=INK, fontsize=9.5)
    axes.set_title(literal(found["scene"]), fontsize=10, color=INK, loc="left")
    tidy(axes)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
