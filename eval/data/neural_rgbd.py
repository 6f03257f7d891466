"""Neural RGB-D: synthetic rooms with exact depth (Azinovic et al., CVPR 2022).

    <root>/<scene>/images/img0.png  img1.png ...      640 x 480
    <root>/<scene>/depth/depth0.png ...               16 bits, millimetres
    <root>/<scene>/poses.txt                          world_from_cam, 4 lines per frame, OpenGL axes; may have "nan"

From https://github.com/dazinovic/neural-rgbd-surface-reconstruction (neural_rgbd_data.zip on kaldir.vc.in.tum.de,
several gigabytes): breakfast_room, complete_kitchen, green_room, grey_white_room, kitchen, morning_apartment,
staircase, thin_geometry, whiteroom.

Numbers in file names are not zero-padded: frames are sorted numerically. Intrinsics are those of the published
protocols: a field of view of 60 degrees, 554.26 pixels at a width of 640, principal point at the centre.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_folders

FIELD_OF_VIEW_DEG = 60.0
UNITS_PER_METER = 1000.0
MAX_DEPTH_M = 10.0  # larger depths are dropped, as in the published protocols
OPENGL_FROM_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@reader("neural_rgbd", is_sequence=True)
def read(root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None) -> Iterator[EvalScene]:
    """Yield the rooms in order of name; arguments as in :class:`geoaccel.eval.data.registry.Reader`."""
    folder = files.folder_of(root, "the neural_rgbd_data folder")
    found = files.folders_with(folder, "poses.txt", "set data.root to the neural_rgbd_data folder")
    return read_folders(found, _read_room, scenes, on_skip)


def _read_room(folder: Path) -> EvalScene:
    poses = _read_poses(folder / "poses.txt")
    images = _numbered(folder / "images", "img")
    if len(images) != len(poses) or (images and max(images) != len(poses) - 1):
        raise UserError(f"{len(images)} images and {len(poses)} poses; fetch the room again")
    size = files.image_size(images[0])
    focal = size[1] / 2.0 / math.tan(math.radians(FIELD_OF_VIEW_DEG / 2.0))
    intrinsics = torch.tensor(
        [[focal, 0.0, size[1] / 2.0], [0.0, focal, size[0] / 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    with_depth = (folder / "depth").is_dir()
    frames = []
    for number in sorted(images):
        read_depth = None
        if with_depth:
            path = files.existing(folder / "depth" / f"depth{number}.png")
            read_depth = partial(files.read_depth_png, path, UNITS_PER_METER, max_depth=MAX_DEPTH_M)
        # Columns are flipped, not rows: camera axes, not world axes
        cam_from_world = invert_rigid(poses[number] @ OPENGL_FROM_OPENCV)
        frames.append(EvalFrame(f"img{number}", cam_from_world, intrinsics, images[number], read_depth=read_depth))
    return make_scene(folder.name, frames)


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    found = {}
    for path in folder.glob(f"{prefix}*.png"):
        match = re.fullmatch(rf"{prefix}(\d+)\.png", path.name)
        if match:
            found[int(match[1])] = path
    return found


def _read_poses(path: Path) -> Tensor:  # [S, 4, 4], float64, NaN where there is none
    try:
        numbers = np.array(files.read_text(path).split(), dtype=np.float64)
        return torch.from_numpy(numbers.reshape(-1, 4, 4))
    except ValueError as error:
        raise UserError(f"{path} does not consist of 4 x 4 matrices ({error}); fetch the room again") from None
