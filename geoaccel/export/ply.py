"""``points.ply``: the coloured points in world coordinates (OpenCV axes of the first camera, as predicted).

A comment in its head says what the unit is.
"""

from __future__ import annotations

from pathlib import Path

from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "points.ply"
HEAD_END = b"end_header\n"

WRITES["ply"] = (FILE,)


@FORMATS.register("ply")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write the points as binary PLY with sRGB colours."""
    import trimesh

    content = trimesh.PointCloud(cloud.points.numpy(), colors=cloud.colors.numpy()).export(file_type="ply")
    (folder / FILE).write_bytes(with_unit(content, scene.unit))


def with_unit(content: bytes, unit: str) -> bytes:
    """A PLY file with a comment in its head that says the unit."""
    return content.replace(HEAD_END, f"comment unit: {unit}\n".encode() + HEAD_END, 1)
