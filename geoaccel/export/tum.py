"""``trajectory.txt``: the cameras' path in the format of TUM RGB-D, which evo and SLAM benchmarks read.

A line is ``timestamp tx ty tz qx qy qz qw``, ``world_from_cam`` with OpenCV axes; the timestamp is the number of the
image among those given. The first lines, with ``#``, say the unit and which image each frame is.
"""

from __future__ import annotations

from pathlib import Path

from geoaccel.cameras import invert_rigid, quaternion
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "trajectory.txt"

WRITES["tum"] = (FILE,)


@FORMATS.register("tum")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write one line for each frame."""
    stamps = scene.numbers or range(len(scene))
    lines = [f"# unit: {scene.unit}", "# timestamp tx ty tz qx qy qz qw"]
    lines += [f"# {stamp} is {name}" for stamp, name in zip(stamps, scene.names, strict=True)]
    for stamp, pose in zip(stamps, invert_rigid(scene.cam_from_world.double()), strict=True):
        w, x, y, z = quaternion(pose[:3, :3])
        lines.append(" ".join(repr(float(number)) for number in (stamp, *pose[:3, 3], x, y, z, w)))
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
