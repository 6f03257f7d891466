"""``transforms.json`` for nerfstudio (and other NeRF and splatting programs that read it).

Poses are ``world_from_cam`` with OpenGL axes (x right, y up, z backward) in the unchanged world of the reconstruction;
intrinsics are in pixels of the original images. ``file_path`` is relative to this file: in ``images/``, unless
photographs are used in place. With masks, ``mask_path`` gives them in the form of nerfstudio (and COLMAP, by their
names): one channel, black is left out. With the format ``depth``, ``depth_file_path`` gives its maps. The coloured
points, from which nerfstudio initialises splats, are named in ``ply_file_path``. ``unit`` names the unit of length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from geoaccel.cameras import invert_rigid
from geoaccel.export import maps, ply
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.frames import image_files, write_masks
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "transforms.json"

WRITES["nerfstudio"] = (FILE, ply.FILE)


@FORMATS.register("nerfstudio")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write the cameras, and ``points.ply`` next to them."""
    opengl_from_opencv = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    poses = invert_rigid(scene.cam_from_world.double()) @ opengl_from_opencv
    cameras = [_camera(k, t.original_size) for k, t in _cameras(scene)]
    files = image_files(scene, folder)
    frames: list[dict[str, Any]] = [
        {"file_path": file, "transform_matrix": pose.tolist()} for file, pose in zip(files, poses, strict=True)
    ]
    document: dict[str, Any] = {"camera_model": "OPENCV", "unit": scene.unit}
    if all(camera == cameras[0] for camera in cameras):
        document |= cameras[0]
    else:
        frames = [{**frame, **camera} for frame, camera in zip(frames, cameras, strict=True)]
    for frame, more in zip(frames, _maps(scene, folder), strict=True):
        frame |= more
    if not (folder / ply.FILE).exists():
        ply.write(scene, cloud, folder)
    document |= {"ply_file_path": ply.FILE, "frames": frames}
    (folder / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _maps(scene: Scene, folder: Path) -> list[dict[str, str]]:
    """Mask and depth of each frame, if there are any."""
    found: list[dict[str, str]] = [{} for _ in scene.names]
    if scene.selected is not None:
        for entry, file in zip(found, write_masks(scene, folder), strict=True):
            entry["mask_path"] = file
    # nerfstudio assumes these steps.
    if (folder / maps.SCALE_FILE).exists() and maps.depth_steps(scene) == maps.STEPS:
        for entry, name in zip(found, maps.map_names(scene, ".png"), strict=True):
            entry["depth_file_path"] = f"{maps.DEPTH_FOLDER}/{name}"
    return found


def _cameras(scene: Scene) -> Any:
    return zip(scene.original_intrinsics().double(), scene.transforms, strict=True)


def _camera(
    intrinsics: torch.Tensor,  # [3, 3]
    size: tuple[int, int],
) -> dict[str, Any]:
    return {
        "fl_x": float(intrinsics[0, 0]),
        "fl_y": float(intrinsics[1, 1]),
        "cx": float(intrinsics[0, 2]),
        "cy": float(intrinsics[1, 2]),
        "w": size[1],
        "h": size[0],
    }
