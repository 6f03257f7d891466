"""``points.ply``: the coloured points in world coordinates (OpenCV axes of the first camera, as predicted)."""

from __future__ import annotations

from pathlib import Path

from geoaccel.export.formats import FORMATS
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "points.ply"


@FORMATS.register("ply")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write the points as binary PLY with sRGB colours."""
    import trimesh

    trimesh.PointCloud(cloud.points.numpy(), colors=cloud.colors.numpy()).export(folder / FILE)
