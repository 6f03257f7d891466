"""Drawing of scenes: depth as colour, tiles, and the scene from above."""

from __future__ import annotations

from typing import Any

import numpy as np

from geoaccel.cameras import invert_rigid
from geoaccel.scene import CONF_PERCENTILE, Scene

VIEW_POINTS = 150_000
ELEVATION = np.radians(50)

PAPER, INK, FAINT, HOLE = "#ffffff", "#22252b", "#7b818c", "#eceef1"


def content(scene: Scene, i: int, maps: np.ndarray) -> np.ndarray:  # [S, H, W, ...]
    """One frame without its padding."""
    left, top, right, bottom = scene.transforms[i].content_box
    return maps[i, top:bottom, left:right]


def photograph(scene: Scene, i: int) -> np.ndarray:  # [h, w, 3]
    """Network input of one frame."""
    left, top, right, bottom = scene.transforms[i].content_box
    return scene.images[i, :, top:bottom, left:right].clamp(0, 1).permute(1, 2, 0).numpy()


def painted(values: np.ndarray, valid: np.ndarray, name: str) -> np.ndarray:  # [h, w, 3]
    """Values as colours of a colour map; grey where invalid."""
    from matplotlib import colormaps

    hole = np.array([int(HOLE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(valid[..., None], colormaps[name](values)[..., :3], hole)


def depth_range(depth: np.ndarray) -> tuple[float, float]:
    """Depth range of the colour map."""
    if len(depth) == 0:
        return 1.0, 2.0
    near, far = np.percentile(depth, [1, 97])
    return float(near), float(max(far, near * 1.01))


def inverse_depth(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """A shade: 1 at `near`, 0.05 at `far`, linear in inverse depth."""
    inverse = 1 / np.maximum(depth, near / 2)
    return 0.05 + 0.95 * np.clip((inverse - 1 / far) / (1 / near - 1 / far), 0, 1)


def show_tile(axes: Any, tile: np.ndarray, color: np.ndarray | None) -> None:
    """An image without ticks, under a line of its frame's colour if one is given."""
    axes.imshow(tile, interpolation="lanczos", interpolation_stage="rgba")
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    for name, spine in axes.spines.items():
        spine.set_visible(color is not None and name == "top")
        if color is not None:
            spine.set_color(tuple(color))
            spine.set_linewidth(3)


def draw_view(axes: Any, scene: Scene, colors: np.ndarray) -> None:
    """Points and cameras in parallel projection, obliquely from above; the first camera looks up the page."""
    from matplotlib.collections import LineCollection, PolyCollection

    world_from_cam = invert_rigid(scene.cam_from_world.double()).numpy()
    view = _view_axes(world_from_cam)
    axes.set_axis_off()
    centres = world_from_cam[:, :3, 3] @ view[:2].T
    low, high = centres.min(axis=0), centres.max(axis=0)
    if scene.kept.any():
        enough = scene.usable(CONF_PERCENTILE).any()  # masks may keep only pixels of low confidence
        cloud = scene.point_cloud(conf_percentile=CONF_PERCENTILE if enough else 0.0, max_points=VIEW_POINTS)
        points = cloud.points.double().numpy() @ view.T
        order = points[:, 2].argsort()
        points, shades = points[order], cloud.colors.numpy()[order] / 255
        axes.scatter(points[:, 0], points[:, 1], s=2.2, c=shades, linewidths=0)
        near, far = np.percentile(points[:, :2], [10, 90], axis=0)
        low, high = np.minimum(low, near), np.maximum(high, far)

    reach = 0.07 * float((high - low).max())
    sizes = [transform.original_size for transform in scene.transforms]
    cameras = zip(sizes, scene.original_intrinsics().double().numpy(), world_from_cam, strict=True)
    pyramids = np.stack([_pyramid(*camera, reach) for camera in cameras])
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


def _pyramid(
    size: tuple[int, int],
    matrix: np.ndarray,  # [3, 3]
    world_from_cam: np.ndarray,  # [4, 4]
    reach: float,
) -> np.ndarray:  # [5, 3]
    """Apex and corners of one camera's field of view in the world; the longest edge of its base is about `reach`."""
    height, width = size
    pixels = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    rays = np.column_stack([(pixels - matrix[:2, 2]) / matrix[[0, 1], [0, 1]], np.ones(4)])
    corners = np.concatenate([np.zeros((1, 3)), rays]) * reach / max(np.ptp(rays[:, 0]), np.ptp(rays[:, 1]))
    return corners @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]


def _view_axes(
    world_from_cam: np.ndarray,  # [S, 4, 4]
) -> np.ndarray:  # [3, 3]
    """Rows: right and up of the image, and the direction to the viewer, who is behind and above."""
    up = -world_from_cam[:, :3, 1].mean(axis=0)
    if np.linalg.norm(up) < 0.3:  # the cameras have no common up direction
        up = -world_from_cam[0, :3, 1]
    up /= np.linalg.norm(up)
    forward = world_from_cam[0, :3, 2] - (world_from_cam[0, :3, 2] @ up) * up
    if np.linalg.norm(forward) < 1e-3:  # it looks straight down: the top of its image points forward
        forward = -world_from_cam[0, :3, 1] + (world_from_cam[0, :3, 1] @ up) * up
    forward /= np.linalg.norm(forward)
    sine, cosine = np.sin(ELEVATION), np.cos(ELEVATION)
    return np.stack([np.cross(forward, up), sine * forward + cosine * up, sine * up - cosine * forward])
