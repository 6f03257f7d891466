"""``trajectory_kitti.txt``: the cameras' path in the format of KITTI odometry.

A line is the upper three rows of ``world_from_cam`` with OpenCV axes, twelve numbers row by row, one line a frame.
"""

from __future__ import annotations

from pathlib import Path

from geoaccel.cameras import invert_rigid
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "trajectory_kitti.txt"

WRITES["kitti"] = (FILE,)


@FORMATS.register("kitti")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write one line for each frame."""
    world_from_cam = invert_rigid(scene.cam_from_world.double())[:, :3].flatten(1)
    lines = [" ".join(map(repr, row)) for row in world_from_cam.tolist()]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
