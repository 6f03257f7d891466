"""An image that compares several reconstructions of one scene side by side, with their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from geoaccel.export.drawing import (
    FAINT,
    INK,
    PAPER,
    content,
    depth_range,
    draw_view,
    inverse_depth,
    painted,
    photograph,
    show_tile,
)
from geoaccel.export.frames import frame_colors
from geoaccel.scene import Scene

MAX_PHOTOGRAPHS = 12
DEPTHS = 4
"""Depth maps per reconstruction."""

_PANEL, _GAP, _MARGIN, _VIEW, _HEAD, _LINE = 5.6, 0.3, 0.15, 3.6, 0.5, 0.2
"""Inches: width of a panel, margins, and heights of a view, a headline and a line of text."""

_DPI = 130


def write_comparison(
    ways: Mapping[str, tuple[Scene, Sequence[str]]],
    path: str | Path | BinaryIO,
    *,
    title: str,
) -> None:
    """Write a PNG: photographs on top, and a panel for each reconstruction with the scene from above, depth, and text.

    Args:
        ways: Name of each reconstruction, such as ``dense``, to its scene and the lines under its panel. All scenes are
            of the same photographs; each is shown at its own scale.
        path: File to write.
        title: Headline.
    """
    from matplotlib.figure import Figure

    first = next(iter(ways.values()))[0]
    columns = len(ways)
    inner = columns * _PANEL + (columns - 1) * _GAP
    strip = _spread(len(first), MAX_PHOTOGRAPHS)
    aspect = first.images.shape[-2] / first.images.shape[-1]
    tile, depth_tile = (inner + 0.04) / len(strip) - 0.04, (_PANEL + 0.04) / DEPTHS - 0.04
    lines = max(len(text) for _, text in ways.values())
    parts = (_HEAD, tile * aspect, _HEAD, _VIEW, depth_tile * aspect, 0.12 + lines * _LINE)
    width, height = inner + 2 * _MARGIN, sum(parts) + 0.3 + 2 * _MARGIN
    figure = Figure(figsize=(width, height), facecolor=PAPER)

    def place(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="top", **{"color": INK, "size": 10, **style})

    write(_MARGIN, _MARGIN, title, size=13, weight="bold")
    colors = frame_colors(len(first))
    top = _MARGIN + _HEAD
    for column, i in enumerate(strip):
        show_tile(place(_MARGIN + column * (tile + 0.04), top, tile, tile * aspect), photograph(first, i), colors[i])
    top += tile * aspect + 0.2
    shown = _spread(len(first), DEPTHS)
    for panel, (name, (scene, text)) in enumerate(ways.items()):
        left = _MARGIN + panel * (_PANEL + _GAP)
        write(left, top, name, size=12, weight="bold")
        draw_view(place(left, top + _HEAD - 0.15, _PANEL, _VIEW), scene, colors)
        below = top + _HEAD - 0.05 + _VIEW
        for column, depth in enumerate(_depths(scene, shown)):
            show_tile(place(left + column * (depth_tile + 0.04), below, depth_tile, depth_tile * aspect), depth, None)
        below += depth_tile * aspect + 0.12
        for number, line in enumerate(text):
            write(left, below + number * _LINE, line, color=INK if number == 0 else FAINT)
    figure.savefig(path, dpi=_DPI, facecolor=PAPER, format="png", metadata={"Unit": first.unit})


def _spread(count: int, most: int) -> list[int]:
    """At most `most` frames, evenly spread."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, most).round())]


def _depths(scene: Scene, frames: Sequence[int]) -> list[np.ndarray]:
    """Depth maps as colours, near is bright, with a common scale."""
    depth, mask = scene.depth.numpy(), scene.mask.numpy()
    near, far = depth_range(depth[mask])
    colour = inverse_depth(depth, near, far)
    return [painted(content(scene, i, colour), content(scene, i, mask), "magma") for i in frames]
