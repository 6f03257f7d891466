"""``points.ply``: the coloured points in world coordinates (OpenCV axes of the first camera, as predicted).

A comment in its header names the unit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "points.ply"
HEAD_END = b"end_header\n"

_WITH_NORMAL = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")] + [(name, "u1") for name in ("red", "green", "blue")]
)

WRITES["ply"] = (FILE,)


@FORMATS.register("ply")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write the points as binary PLY with sRGB colours."""
    import trimesh

    content = trimesh.PointCloud(cloud.points.numpy(), colors=cloud.colors.numpy()).export(file_type="ply")
    (folder / FILE).write_bytes(with_unit(content, scene.unit))


def with_unit(content: bytes, unit: str) -> bytes:
    """A PLY file with a comment in its header that names the unit."""
    return content.replace(HEAD_END, f"comment unit: {unit}\n".encode() + HEAD_END, 1)


def for_splats(cloud: PointCloud, unit: str) -> bytes:
    """A PLY file to initialise 3DGS: its loader requires normals but does not use them, so they are zero."""
    vertices = np.zeros(len(cloud), _WITH_NORMAL)
    for columns, values in (("xyz", cloud.points), (("red", "green", "blue"), cloud.colors)):
        for name, column in zip(columns, values.numpy().T, strict=True):
            vertices[name] = column
    kinds = {"f": "float", "u": "uchar"}
    named = "".join(f"property {kinds[_WITH_NORMAL[name].kind]} {name}\n" for name in _WITH_NORMAL.names or ())
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(cloud)}\n{named}".encode() + HEAD_END
    return with_unit(head, unit) + vertices.tobytes()
