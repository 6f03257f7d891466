"""A small scene as viewers show it: a wall behind a box, sure on the left, seen by two cameras."""

from __future__ import annotations

import numpy as np

from geoaccel.export.view import View, lens_of, make_view, small_jpeg

NAMES = ("a.jpg", "b.jpg")


def a_view(every: int = 1) -> View:
    """20 000 points in front of two cameras; of every so many one."""
    x, y = np.meshgrid(np.linspace(-2, 2, 200), np.linspace(-1, 1, 100))
    box = (np.abs(x) < 0.6) & (np.abs(y) < 0.5)
    points = np.stack([x, y, np.where(box, 3.0, 4.0)], axis=-1).reshape(-1, 3)
    colors = np.stack([np.where(box, 220, 60), np.full_like(x, 120), 100 + 60 * x], axis=-1).reshape(-1, 3)
    edge = np.abs(np.abs(x) - 0.6) + 0.0 * y < 0.25
    poses = np.stack([np.eye(4)] * 2)
    poses[:, 0, 3] = (0.5, -0.5)  # cameras at x = -0.5 and 0.5
    size = np.array([[60, 80]] * 2)
    intrinsics = np.array([[[80.0, 0, 40], [0, 80, 30], [0, 0, 1]]] * 2)
    photograph = np.full((60, 80, 3), (40, 160, 90), np.uint8)
    cameras = {"cam_from_world": poses, "lens": lens_of(intrinsics, size), "size": size, "names": np.array(NAMES)}
    return make_view(
        points[::every].astype(np.float32),
        colors[::every].astype(np.uint8),
        cameras,
        conf=-points[::every, 0],
        jump=np.where(edge, 0.33, 0.0).reshape(-1)[::every],
        photographs=[small_jpeg(photograph)] * 2,
        unit="metre",
        cut=0.0,
    )


def two_results() -> dict[str, View]:
    """One with all points, and one with a third of them."""
    return {"dense": a_view(), "accelerated": a_view(3)}
