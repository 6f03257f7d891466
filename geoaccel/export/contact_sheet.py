"""Contact sheet of a scene: photographs, depth and confidence side by side, and the scene from above."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

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
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.frames import frame_colors
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import CONF_PERCENTILE, Scene

FILE = "contact_sheet.png"
MAX_COLUMNS = 8

_TILE_INCHES = 1.75
_DPI = 150


def write_contact_sheet(
    scene: Scene,
    path: str | Path | BinaryIO,
    *,
    title: str | None = None,
    gt_depth: Tensor | None = None,  # [S, H, W]
) -> None:
    """Write a PNG to judge a reconstruction at a glance.

    Depth is coloured by inverse depth, near is bright, with one scale for all frames. Confidence is coloured by rank
    within the scene, because only that is comparable across models; darkest is the part that `point_cloud` leaves out
    by default. Padding is cut off; pixels without a prediction are grey.

    Args:
        title: Headline.
        gt_depth: Ground-truth depth at the resolution of the network input, 0 for unknown; shown in its own row, scaled
            to the prediction by the ratio of medians.
    """
    from matplotlib.figure import Figure

    chosen = np.unique(np.linspace(0, len(scene) - 1, MAX_COLUMNS).round().astype(int))
    rows = _rows(scene, chosen, gt_depth)
    aspect = float(np.median([tile.shape[0] / tile.shape[1] for tile in rows[0][1]]))
    tile_height = _TILE_INCHES * min(max(aspect, 0.5), 1.5)
    head, foot, side = 0.62, 0.12, 0.95
    grid_width, grid_height = len(chosen) * (_TILE_INCHES + 0.05), len(rows) * (tile_height + 0.05)
    view_size = min(grid_height, 6.0)
    width, height = side + grid_width + 0.25 + view_size + foot, head + grid_height + foot

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    _write_head(figure, title or "Reconstruction", _summary(scene, chosen), left=foot / width, height=height)
    colors = frame_colors(len(scene))
    for r, (label, tiles, legend) in enumerate(rows):
        bottom = 1 - (head + (r + 1) * (tile_height + 0.05) - 0.05) / height
        _write_label(figure, foot / width, bottom + tile_height / height, label, legend, width, height)
        for c, tile in enumerate(tiles):
            left = (side + c * (_TILE_INCHES + 0.05)) / width
            axes = figure.add_axes((left, bottom, _TILE_INCHES / width, tile_height / height))
            show_tile(axes, tile, colors[chosen[c]] if r == 0 else None)
    left = (side + grid_width + 0.25) / width
    axes = figure.add_axes((left, foot / height, view_size / width, grid_height / height))
    draw_view(axes, scene, colors)
    figure.savefig(path, dpi=_DPI, facecolor=PAPER, format="png", metadata={"Unit": scene.unit})


def _rows(
    scene: Scene, chosen: np.ndarray, gt_depth: Tensor | None
) -> list[tuple[str, list[np.ndarray], tuple[str, str, str] | None]]:
    """Label, coloured tiles [h, w, 3] and legend (colour map, low, high) of each row."""

    def paint(values: np.ndarray, valid: np.ndarray, name: str) -> list[np.ndarray]:
        return [painted(content(scene, i, values), content(scene, i, valid), name) for i in chosen]

    mask = scene.mask.numpy()
    depth = scene.depth.numpy()
    near, far = depth_range(depth[mask])
    photographs = [photograph(scene, i) for i in chosen]
    rows: list[tuple[str, list[np.ndarray], Any]] = [("photograph", photographs, None)]
    rows.append(("depth", paint(inverse_depth(depth, near, far), mask, "magma"), ("magma", "far", "near")))
    if gt_depth is not None:
        truth = gt_depth.float().cpu().numpy()
        known = np.isfinite(truth) & (truth > 0)
        both = known & mask
        scale = np.median(depth[both]) / np.median(truth[both]) if both.any() else 1.0
        true = paint(inverse_depth(truth * scale, near, far), known, "magma")
        rows.append(("true depth", true, ("magma", "far", "near")))
    rank = _rank(scene.conf.numpy(), mask)
    shown = np.where(rank < CONF_PERCENTILE / 100, 0.0, 0.2 + 0.8 * rank)
    rows.append(("confidence", paint(shown, mask, "viridis"), ("viridis", "left out", "surest")))
    return rows


def _rank(
    conf: np.ndarray,  # [S, H, W]
    mask: np.ndarray,  # [S, H, W]
) -> np.ndarray:  # [S, H, W] in [0, 1]
    """Fraction of the scene's valid pixels that are less confident."""
    ordered = np.sort(conf[mask])
    return np.searchsorted(ordered, conf) / max(len(ordered), 1)


def _summary(scene: Scene, chosen: np.ndarray) -> str:
    count, (height, width) = len(scene), scene.depth.shape[1:]
    frames = f"{count} photographs" if len(chosen) == count else f"{len(chosen)} of {count} photographs"
    return f"{frames}, seen at {width} x {height}"


def _write_head(figure: Any, title: str, summary: str, *, left: float, height: float) -> None:
    figure.text(left, 1 - 0.12 / height, title, size=13, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.37 / height, summary, size=8.5, color=FAINT, va="top")


def _write_label(
    figure: Any, left: float, top: float, label: str, legend: tuple[str, str, str] | None, width: float, height: float
) -> None:
    """Name of a row in the margin, with its colour legend below."""
    figure.text(left, top - 0.02 / height, label, size=9, color=INK, va="top")
    if legend is None:
        return
    name, low, high = legend
    axes = figure.add_axes((left, top - 0.38 / height, 0.72 / width, 0.1 / height))
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=name, aspect="auto")
    axes.set_axis_off()
    axes.text(0, 1.3, low, size=6.5, color=FAINT, va="top", ha="left")
    axes.text(127, 1.3, high, size=6.5, color=FAINT, va="top", ha="right")


WRITES["png"] = (FILE,)


@FORMATS.register("png")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write ``contact_sheet.png``."""
    write_contact_sheet(scene, folder / FILE)
