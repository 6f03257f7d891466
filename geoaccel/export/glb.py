"""``scene.glb``: coloured points and one frustum per camera, for any glTF viewer.

Points stay in world coordinates (OpenCV axes); the scene's root node rotates them upright for glTF, whose y axis points
up: it flips y and z and then rotates the cameras' average up direction to +y. glTF colours are linear, so the sRGB
colours of the images are converted, with dithering against banding in dark regions. The ``extras`` of the scene name
the unit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geoaccel.cameras import invert_rigid
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.frames import frame_colors
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "scene.glb"
POINTS_NAME = "points"
MOST_FRUSTA = 1000
"""Most cameras drawn, evenly spread."""

_FRUSTUM_EDGES = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1), (1, 5), (5, 2)]
_STRUT_FACES = np.array(
    [[i, (i + 1) % 4, i + 4] for i in range(4)]
    + [[(i + 1) % 4, (i + 1) % 4 + 4, i + 4] for i in range(4)]
    + [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7]]
)

WRITES["glb"] = (FILE,)


@FORMATS.register("glb")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write points and frusta; frusta run from blue (first frame) to red (last) and bear the images' names."""
    import trimesh

    world_from_cam = invert_rigid(scene.cam_from_world.double()).numpy()
    upright = gltf_from_world(world_from_cam)
    drawing = trimesh.Scene(metadata={"unit": scene.unit})
    points = trimesh.PointCloud(cloud.points.numpy(), colors=_linear_colors(cloud.colors.numpy()))
    drawing.add_geometry(points, geom_name=POINTS_NAME, node_name=POINTS_NAME, transform=upright)
    size = frustum_size(scene)
    intrinsics = scene.original_intrinsics().double().numpy()
    colors = frame_colors(len(scene))
    for i in np.linspace(0, len(scene) - 1, min(len(scene), MOST_FRUSTA)).round().astype(int).tolist():
        color = colors[i]
        mesh = _frustum(intrinsics[i], scene.transforms[i].original_size, size)
        mesh.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(
                baseColorFactor=[*color, 1.0], emissiveFactor=color * 0.5, metallicFactor=0.0, roughnessFactor=1.0
            )
        )
        name = f"camera_{i:04d}_{scene.names[i]}"
        drawing.add_geometry(mesh, geom_name=name, node_name=name, transform=upright @ world_from_cam[i])
    drawing.export(folder / FILE)


def gltf_from_world(
    world_from_cam: np.ndarray,  # [S, 4, 4]
) -> np.ndarray:  # [4, 4]
    """OpenCV world to glTF axes, with the average up direction of the cameras along +y."""
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    up = (flip[:3, :3] @ -world_from_cam[:, :3, 1].T).mean(axis=1)
    length = np.linalg.norm(up)
    if length < 0.3:  # the cameras have no common up direction
        return flip
    x, y, z = up / length
    if y < -0.999:
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ flip
    cross = np.array([[0.0, -x, 0.0], [x, 0.0, z], [0.0, -z, 0.0]])
    rotation = np.eye(4)
    rotation[:3, :3] += cross + cross @ cross / (1 + y)
    return rotation @ flip


def frustum_size(scene: Scene) -> float:
    """Length of a frustum: a tenth of the distance to the scene, less if cameras are close together."""
    step = max(1, len(scene) // 100)  # some frames of a long sequence suffice
    depth, usable = scene.depth[::step], scene.mask[::step]
    depth = depth[usable & (depth > 0)]
    distance = float(depth.median()) if len(depth) else 1.0
    centres = invert_rigid(scene.cam_from_world)[:, :3, 3]
    step_length = float((centres[1:] - centres[:-1]).norm(dim=-1).median()) if len(centres) > 1 else distance
    return min(0.12 * distance, max(0.6 * step_length, 0.04 * distance))


def _frustum(intrinsics: np.ndarray, original_size: tuple[int, int], size: float):
    """Wire frame of one camera in its own coordinates, from bars that any viewer shows; a roof marks its top."""
    import trimesh

    height, width = original_size
    pixels = np.array([[0, 0], [width, 0], [width, height], [0, height], [width / 2, -0.25 * height]])
    rays = (pixels - intrinsics[:2, 2]) / intrinsics[[0, 1], [0, 1]]
    corners = np.concatenate([np.zeros((1, 3)), np.column_stack([rays, np.ones(5)]) * size])
    start, end = (corners[list(ends)] for ends in zip(*_FRUSTUM_EDGES, strict=True))
    vertices = _struts(start, end, radius=0.015 * size)
    faces = _STRUT_FACES + 8 * np.arange(len(start))[:, None, None]
    return trimesh.Trimesh(vertices.reshape(-1, 3), faces.reshape(-1, 3), process=False)


def _struts(
    start: np.ndarray,  # [E, 3]
    end: np.ndarray,  # [E, 3]
    radius: float,
) -> np.ndarray:  # [E, 8, 3]
    """Corners of a thin square bar around every edge: four at its start, four at its end."""
    along = (end - start) / np.linalg.norm(end - start, axis=1, keepdims=True)
    helper = np.eye(3)[np.abs(along).argmin(axis=1)]
    side = np.cross(along, helper)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    other = np.cross(along, side)
    ring = radius * np.stack([side, other, -side, -other], axis=1)
    return np.concatenate([start[:, None] + ring, end[:, None] + ring], axis=1)


def _linear_colors(
    srgb: np.ndarray,  # [N, 3] uint8
) -> np.ndarray:  # [N, 3] uint8
    """Convert sRGB to linear, rounding at random (dithering) because 8 bits have few dark levels."""
    values = np.arange(256) / 255
    curve = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) * 255
    noise = np.random.default_rng(0).random(srgb.shape, dtype=np.float32)
    return np.floor(curve.astype(np.float32)[srgb] + noise).clip(0, 255).astype(np.uint8)
