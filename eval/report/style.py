"""Style of plots: colours that colour-blind readers can tell apart, and labels that do not cover the points."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from geoaccel.eval.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import AbstractPathEffect
    from numpy.typing import NDArray

INK, FAINT, GRID = "#22252b", "#7b818c", "#e3e6ea"
DPI = 200
# Okabe and Ito's colours for colour-blind readers, without yellow, which is too pale for a line. Black is the
# dense model's.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Possible places of a label: the direction from its point, and the distance of its edge, in points. The first free
# place is used.
_PLACES = (
    *(((0, 1), (0, 6)), ((1, 0), (7, 0)), ((1, 1), (6, 4)), ((0, -1), (0, 6))),
    *(((-1, -1), (6, 4)), ((-1, 0), (7, 0)), ((-1, 1), (6, 4)), ((1, -1), (6, 4))),
)


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one line."""

    color: str
    marker: str
    dash: Literal["-", "--", "none"] = "-"

    def paler(self, amount: float) -> Look:
        """The same mixed with white: 0 is unchanged, 1 is white."""
        parts = [int(self.color[i : i + 2], 16) for i in (1, 3, 5)]
        return replace(self, color="#" + "".join(f"{round(part + amount * (255 - part)):02x}" for part in parts))


@dataclass(frozen=True)
class Word:
    """A label at a point, in data coordinates."""

    x: float
    y: float
    text: str
    color: str


DENSE = Look(INK, "*", "none")


def method_looks(rows: Sequence[Row]) -> dict[str, Look]:
    """Look of each method, in the order of the rows."""
    return looks(row.method for row in rows if not row.is_dense)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Look of each name, in their order; colours and markers have different periods."""
    return {
        name: Look(_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def literal(text: str) -> str:
    """Text that matplotlib does not parse as a formula, and can draw: file names need not be UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")


LEGEND_LINE, LEGEND_LINES = 0.21, 2
"""Height of a line in inches, and the number of lines that fit in every figure, besides one for a note."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with room between its panels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def halo() -> list[AbstractPathEffect]:
    """A white outline around letters, so that they are readable on a line."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def tidy(axes: Axes) -> None:
    """A light grid, and a frame on two sides only."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, which="both")


def write_legend(figure: Figure, style: dict[str, Look], *, dense: Look | None, note: str = "") -> None:
    """One legend for all panels, below them, with notes above it; the figure grows with the number of lines."""
    from matplotlib.lines import Line2D

    entries = {"dense": dense, **style} if dense else style
    handles = [
        Line2D(
            [],
            [],
            color=look.color,
            marker=look.marker,
            markersize=11 if look is dense else 6,
            linestyle=look.dash,
        )
        for look in entries.values()
    ]
    longest = max((len(name) for name in entries), default=1)
    width, height = figure.get_size_inches()
    columns = max(1, min(len(entries), int(width * 12) // (longest + 8)))
    note = "\n".join(textwrap.fill(line, int(width * 15)) for line in note.split("\n"))
    lines = -(-len(entries) // columns) + note.count("\n")
    figure.set_figheight(height + LEGEND_LINE * max(0, lines - LEGEND_LINES))
    legend = figure.legend(
        handles,
        [literal(name) for name in entries],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=literal(note) or None,
        title_fontsize=8,
    )
    legend.get_title().set_color(FAINT)
    legend.get_title().set_multialignment("center")


def write_words(axes: Axes, words: Sequence[Word]) -> None:
    """Write each label next to its point if it covers no line, point or other label; else leave it out.

    The figure must have its final layout and axis limits.
    """
    pixels = axes.figure.dpi / 72
    frame = axes.bbox.extents
    taken = _ink(axes, pixels)
    for word in words:
        note = axes.annotate(
            literal(word.text),
            (word.x, word.y),
            (0, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=word.color,
            ha="center",
            va="center",
            path_effects=halo(),
        )
        note.set_in_layout(False)
        centered = note.get_window_extent()
        half = np.array((centered.width, centered.height)) / 2
        for towards, offset in _PLACES:
            # The centre of the label, so that its edge is `offset` away from the point.
            shift = np.multiply(towards, half + pixels * np.array(offset))
            middle = axes.transData.transform((word.x, word.y)) + shift
            box = np.hstack((middle - half - pixels, middle + half + pixels))
            covers = (box[:2] < taken[:, 2:]).all(axis=1) & (taken[:, :2] < box[2:]).all(axis=1)
            if np.all(frame[:2] <= box[:2]) and np.all(box[2:] <= frame[2:]) and not covers.any():
                note.set_position(tuple(shift / pixels))
                taken = np.vstack((taken, box))
                break
        else:
            note.remove()


def _ink(axes: Axes, pixels: float) -> NDArray[np.float64]:  # [N, 4], x0 y0 x1 y1
    """Boxes, in pixels, of the points of all lines and of small segments between them."""
    boxes = [np.empty((0, 4))]
    for line in axes.lines:
        if line.get_transform() != axes.transData:
            continue
        corners = axes.transData.transform(np.asarray(line.get_xydata(), dtype=float))
        boxes.append(np.hstack((corners - 4 * pixels, corners + 4 * pixels)))
        for start, end in pairwise(corners):
            steps = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) // 6))[1:-1, None]
            between = start + steps * (end - start)
            boxes.append(np.hstack((between - pixels, between + pixels)))
    return np.vstack(boxes)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
