"""One picture of a scene: photographs, depth and confidence side by side, and the scene from above."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.frames import frame_colors
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import CONF_PERCENTILE, Scene

FILE = "contact_sheet.png"
MAX_COLUMNS = 8
VIEW_POINTS = 150_000
ELEVATION = np.radians(50)

_TILE_INCHES = 1.75
_DPI = 150
_PAPER, _INK, _FAINT, _HOLE = "#ffffff", "#22252b", "#7b818c", "#eceef1"


def write_contact_sheet(
    scene: Scene,
    path: str | Path | BinaryIO,
    *,
    title: str | None = None,
    gt_depth: Tensor | None = None,  # [S, H, W]
) -> None:
    """Write a PNG that shows at a glance whether a reconstruction is any good.

    Depth is coloured by inverse depth, near is bright, with one scale for all frames. Confidence is coloured by rank
    within the scene, because only that means the same for every model; darkest is the part that `point_cloud` leaves
    out by default. Padding is cut off; pixels without a prediction stay grey.

    Args:
        title: Headline.
        gt_depth: True depth at the resolution of the network input, 0 where unknown; shown in a row of its own, scaled
            to the prediction by the ratio of the medians.
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

    figure = Figure(figsize=(width, height), facecolor=_PAPER)
    _write_head(figure, title or "Reconstruction", _summary(scene, chosen), left=foot / width, height=height)
    colors = frame_colors(len(scene))
    for r, (label, tiles, legend) in enumerate(rows):
        bottom = 1 - (head + (r + 1) * (tile_height + 0.05) - 0.05) / height
        _write_label(figure, foot / width, bottom + tile_height / height, label, legend, width, height)
        for c, tile in enumerate(tiles):
            left = (side + c * (_TILE_INCHES + 0.05)) / width
            axes = figure.add_axes((left, bottom, _TILE_INCHES / width, tile_height / height))
            _show(axes, tile, colors[chosen[c]] if r == 0 else None)
    left = (side + grid_width + 0.25) / width
    axes = figure.add_axes((left, foot / height, view_size / width, grid_height / height))
    _draw_view(axes, scene, colors)
    figure.savefig(path, dpi=_DPI, facecolor=_PAPER, format="png", metadata={"Unit": scene.unit})


def _rows(
    scene: Scene, chosen: np.ndarray, gt_depth: Tensor | None
) -> list[tuple[str, list[np.ndarray], tuple[str, str, str] | None]]:
    """Label, coloured tiles [h, w, 3] and legend (colour map, low, high) of each row."""
    from matplotlib import colormaps

    boxes = [scene.transforms[i].content_box for i in chosen]

    def crop(maps: np.ndarray) -> list[np.ndarray]:
        return [maps[i, top:bottom, left:right] for i, (left, top, right, bottom) in zip(chosen, boxes, strict=True)]

    hole = np.array([int(_HOLE[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    def paint(values: np.ndarray, valid: np.ndarray, name: str) -> list[np.ndarray]:
        pairs = zip(crop(values), crop(valid), strict=True)
        return [np.where(good[..., None], colormaps[name](value)[..., :3], hole) for value, good in pairs]

    mask = scene.mask.numpy()
    depth = scene.depth.numpy()
    near, far = _range(depth[mask])
    photographs = crop(scene.images.clamp(0, 1).permute(0, 2, 3, 1).numpy())
    rows: list[tuple[str, list[np.ndarray], Any]] = [("photograph", photographs, None)]
    rows.append(("depth", paint(_inverse(depth, near, far), mask, "magma"), ("magma", "far", "near")))
    if gt_depth is not None:
        truth = gt_depth.float().cpu().numpy()
        known = np.isfinite(truth) & (truth > 0)
        both = known & mask
        scale = np.median(depth[both]) / np.median(truth[both]) if both.any() else 1.0
        rows.append(("true depth", paint(_inverse(truth * scale, near, far), known, "magma"), ("magma", "far", "near")))
    rank = _rank(scene.conf.numpy(), mask)
    shown = np.where(rank < CONF_PERCENTILE / 100, 0.0, 0.2 + 0.8 * rank)
    rows.append(("confidence", paint(shown, mask, "viridis"), ("viridis", "left out", "surest")))
    return rows


def _range(depth: np.ndarray) -> tuple[float, float]:
    """Nearest and farthest depth worth a colour of its own."""
    if len(depth) == 0:
        return 1.0, 2.0
    near, far = np.percentile(depth, [1, 97])
    return float(near), float(max(far, near * 1.01))


def _inverse(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """1 at `near`, 0.05 at `far`, linear in inverse depth."""
    inverse = 1 / np.maximum(depth, near / 2)
    return 0.05 + 0.95 * np.clip((inverse - 1 / far) / (1 / near - 1 / far), 0, 1)


def _rank(
    conf: np.ndarray,  # [S, H, W]
    mask: np.ndarray,  # [S, H, W]
) -> np.ndarray:  # [S, H, W] in [0, 1]
    """Share of the scene's valid pixels that are less sure."""
    ordered = np.sort(conf[mask])
    return np.searchsorted(ordered, conf) / max(len(ordered), 1)


def _summary(scene: Scene, chosen: np.ndarray) -> str:
    count, (height, width) = len(scene), scene.depth.shape[1:]
    frames = f"{count} photographs" if len(chosen) == count else f"{len(chosen)} of {count} photographs"
    return f"{frames}, seen at {width} x {height}"


def _write_head(figure: Any, title: str, summary: str, *, left: float, height: float) -> None:
    figure.text(left, 1 - 0.12 / height, title, size=13, weight="bold", color=_INK, va="top")
    figure.text(left, 1 - 0.37 / height, summary, size=8.5, color=_FAINT, va="top")


def _write_label(
    figure: Any, left: float, top: float, label: str, legend: tuple[str, str, str] | None, width: float, height: float
) -> None:
    """Name of a row in the margin, and below it what its colours mean."""
    figure.text(left, top - 0.02 / height, label, size=9, color=_INK, va="top")
    if legend is None:
        return
    name, low, high = legend
    axes = figure.add_axes((left, top - 0.38 / height, 0.72 / width, 0.1 / height))
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=name, aspect="auto")
    axes.set_axis_off()
    axes.text(0, 1.3, low, size=6.5, color=_FAINT, va="top", ha="left")
    axes.text(127, 1.3, high, size=6.5, color=_FAINT, va="top", ha="right")


def _show(axes: Any, tile: np.ndarray, color: np.ndarray | None) -> None:
    axes.imshow(tile, interpolation="lanczos", interpolation_stage="rgba")
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    for name, spine in axes.spines.items():
        spine.set_visible(color is not None and name == "top")
        if color is not None:
            spine.set_color(tuple(color))
            spine.set_linewidth(3)


def _draw_view(axes: Any, scene: Scene, colors: np.ndarray) -> None:
    """Points and cameras in parallel projection, obliquely from above; the first camera looks up the page."""
    from matplotlib.collections import LineCollection, PolyCollection

    world_from_cam = invert_rigid(scene.cam_from_world.double()).numpy()
    view = _view_axes(world_from_cam)
    axes.set_axis_off()
    centres = world_from_cam[:, :3, 3] @ view[:2].T
    low, high = centres.min(axis=0), centres.max(axis=0)
    if scene.mask.any():
        cloud = scene.point_cloud(conf_percentile=CONF_PERCENTILE, max_points=VIEW_POINTS)
        points = cloud.points.double().numpy() @ view.T
        order = points[:, 2].argsort()
        points, shades = points[order], cloud.colors.numpy()[order] / 255
        axes.scatter(points[:, 0], points[:, 1], s=2.2, c=shades, linewidths=0)
        near, far = np.percentile(points[:, :2], [10, 90], axis=0)
        low, high = np.minimum(low, near), np.maximum(high, far)

    reach = 0.07 * float((high - low).max())
    pyramids = np.stack([_pyramid(scene, i, world_from_cam[i], reach) for i in range(len(scene))])
    pyramids = pyramids @ view[:2].T
    for pyramid, color in zip(pyramids, colors, strict=True):
        sides = pyramid[[[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]]]
        axes.add_collection(PolyCollection(sides, facecolors=(*color, 0.18), linewidths=0, zorder=3))
        axes.add_collection(LineCollection(sides, colors=color, linewidths=1.1, zorder=3))
        axes.add_collection(LineCollection([pyramid[[1, 2, 3, 4, 1]]], colors=color, linewidths=1.1, zorder=3))
    low, high = np.minimum(low, pyramids.min(axis=(0, 1))), np.maximum(high, pyramids.max(axis=(0, 1)))
    box = np.array([axes.bbox.width, axes.bbox.height])
    half = 0.52 * box * ((high - low) / box).max()
    axes.set(
        xlim=(low + high)[0] / 2 + half[0] * np.array([-1, 1]), ylim=(low + high)[1] / 2 + half[1] * np.array([-1, 1])
    )


def _pyramid(scene: Scene, i: int, world_from_cam: np.ndarray, reach: float) -> np.ndarray:  # [5, 3]
    """Apex and corners of one camera's field of view in the world; the longest edge of its base is about `reach`."""
    height, width = scene.transforms[i].original_size
    matrix = scene.original_intrinsics()[i].double().numpy()
    pixels = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    rays = np.column_stack([(pixels - matrix[:2, 2]) / matrix[[0, 1], [0, 1]], np.ones(4)])
    corners = np.concatenate([np.zeros((1, 3)), rays]) * reach / max(np.ptp(rays[:, 0]), np.ptp(rays[:, 1]))
    return corners @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]


def _view_axes(
    world_from_cam: np.ndarray,  # [S, 4, 4]
) -> np.ndarray:  # [3, 3]
    """Rows: right and up of the picture, and the direction to the viewer, who stands behind and above."""
    up = -world_from_cam[:, :3, 1].mean(axis=0)
    if np.linalg.norm(up) < 0.3:  # the cameras disagree about where up is
        up = -world_from_cam[0, :3, 1]
    up /= np.linalg.norm(up)
    forward = world_from_cam[0, :3, 2] - (world_from_cam[0, :3, 2] @ up) * up
    if np.linalg.norm(forward) < 1e-3:  # it looks straight down: the top of its picture shows forward
        forward = -world_from_cam[0, :3, 1] + (world_from_cam[0, :3, 1] @ up) * up
    forward /= np.linalg.norm(forward)
    sine, cosine = np.sin(ELEVATION), np.cos(ELEVATION)
    return np.stack([np.cross(forward, up), sine * forward + cosine * up, sine * up - cosine * forward])


WRITES["png"] = (FILE,)


@FORMATS.register("png")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write ``contact_sheet.png``."""
    write_contact_sheet(scene, folder / FILE)
