"""``mesh.ply``: one coloured surface from all depth maps, by Open3D's TSDF fusion (extra ``mesh``).

Only pixels used by the point cloud are fused, up to `FARTHEST` median depths. A voxel is `VOXEL_PIXELS` pixels of
the network input wide, at the median depth; the surface is where the depth maps agree within `TRUNCATION` voxels.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from geoaccel.export.formats import FORMATS, NEEDS, WRITES
from geoaccel.export.ply import with_unit
from geoaccel.open3d_loader import load_open3d
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

logger = logging.getLogger(__name__)

FILE = "mesh.ply"
VOXEL_PIXELS = 1.5
TRUNCATION = 4.0
FARTHEST = 5.0  # beyond, a pixel covers so many voxels that memory runs out
BLOCKS = 10_000
"""Initial number of blocks of 16 x 16 x 16 voxels; it can grow."""

NEEDS["mesh"] = load_open3d

WRITES["mesh"] = (FILE,)


@FORMATS.register("mesh")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write the mesh as binary PLY with sRGB colours of its vertices."""
    import trimesh

    vertices, faces, colors = fuse(scene, cloud)
    if not len(faces):
        logger.warning("the depth maps give no surface: %s is not written", FILE)
        return
    mesh = trimesh.Trimesh(vertices, faces, vertex_colors=(255 * colors).round().astype(np.uint8), process=False)
    content: Any = mesh.export(file_type="ply")
    (folder / FILE).write_bytes(with_unit(content, scene.unit))


def fuse(scene: Scene, cloud: PointCloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [V, 3], [F, 3], [V, 3]
    """Vertices, faces and colours in [0, 1] of the fused surface."""
    open3d = load_open3d()
    kept = scene.kept & (scene.conf >= cloud.conf.min())
    focal = scene.intrinsics[:, [0, 1], [0, 1]].mean(-1)
    voxel = VOXEL_PIXELS * float((scene.depth / focal[:, None, None])[kept].median())
    if not 0 < voxel < float("inf"):
        return np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))
    core, image = open3d.core, open3d.t.geometry.Image
    volume = open3d.t.geometry.VoxelBlockGrid(
        attr_names=("tsdf", "weight", "color"),
        attr_dtypes=(core.float32,) * 3,
        attr_channels=((1), (1), (3)),
        voxel_size=voxel,
        block_resolution=16,
        block_count=BLOCKS,
        device=core.Device("CPU:0"),
    )
    farthest = FARTHEST * float(scene.depth[kept].median())
    images = scene.images.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
    for i, pose in enumerate(scene.cam_from_world.double().numpy()):
        depth = image(scene.depth[i].where(kept[i], 0.0).contiguous().numpy())
        matrix = scene.intrinsics[i].double().numpy().copy()
        matrix[:2, 2] -= 0.5  # Open3D has pixel centres at integers
        camera, rules = (core.Tensor(matrix), core.Tensor(pose)), (1.0, farthest, TRUNCATION)
        blocks = volume.compute_unique_block_coordinates(depth, *camera, *rules)
        volume.integrate(blocks, depth, image(images[i]), *camera, *rules)
    mesh = volume.extract_triangle_mesh(weight_threshold=1.0).to_legacy()
    return np.asarray(mesh.vertices), np.asarray(mesh.triangles), np.asarray(mesh.vertex_colors)
