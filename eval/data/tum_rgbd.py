"""TUM RGB-D: rooms filmed with a Kinect, poses from motion capture (Sturm et al., IROS 2012).

    <root>/rgbd_dataset_freiburg3_sitting_static/rgb.txt           "timestamp rgb/1341845688.561760.png"
                                                 depth.txt         "timestamp depth/...png"
                                                 groundtruth.txt   "timestamp tx ty tz qx qy qz qw", world_from_cam
                                                 rgb/  depth/      640 x 480; depth: 16 bits, 5000 = one metre

From https://cvg.cit.tum.de/data/datasets/rgbd-dataset/download , one archive per sequence (0.1 to 2 GB).

The three streams have separate timestamps: a photograph gets the depth map and the pose nearest in time, if within
0.02 s, as in the dataset's associate.py; other photographs are dropped and listed in ``dropped``. Depth is registered
to the photographs. The lenses of freiburg1 and freiburg2 have distortion, so their intrinsics are None; freiburg3 is
rectified: (535.4, 539.2, 320.1, 247.6), with the first pixel's centre at 0, so half a pixel is added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.colmap_model import rotation_from_quaternion
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import (
    EvalFrame,
    EvalScene,
    Names,
    OnSkip,
    Root,
    Skipped,
    make_scene,
    read_folders,
)

UNITS_PER_METER = 5000.0
MAX_TIME_GAP_S = 0.02
PIXEL_SHIFT = 0.5
FREIBURG3 = torch.tensor(
    [[535.4, 0.0, 320.1 + PIXEL_SHIFT], [0.0, 539.2, 247.6 + PIXEL_SHIFT], [0.0, 0.0, 1.0]], dtype=torch.float64
)


@reader("tum_rgbd", is_sequence=True)
def read(root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None, depth: bool = True) -> Iterator[EvalScene]:
    """Yield the sequences in order of name.

    Args:
        root: Folder of the sequences.
        scenes: Only these sequences.
        on_skip: Called with each sequence that is left out.
        depth: If False, also keep photographs without a depth map near in time.
    """
    folder = files.folder_of(root, "the folder of rgbd_dataset_freiburg1_desk, ...")
    found = files.folders_with(folder, "groundtruth.txt", "give the folder of the sequences")
    return read_folders(found, partial(_read_sequence, with_depth=depth), scenes, on_skip)


def _read_sequence(folder: Path, with_depth: bool) -> EvalScene:
    poses = _read_table(folder / "groundtruth.txt", 8)
    depths = _read_table(folder / "depth.txt", 2) if with_depth else []
    intrinsics = FREIBURG3 if "freiburg3" in folder.name else None
    frames, dropped = [], []
    for time, (file,) in _read_table(folder / "rgb.txt", 2):
        pose, depth = _nearest(poses, time), _nearest(depths, time)
        if pose is None or (with_depth and depth is None):
            what = "pose" if pose is None else "depth map"
            dropped.append(Skipped(file, f"no {what} within {MAX_TIME_GAP_S} s"))
            continue
        read_depth = None
        if depth is not None:
            read_depth = partial(files.read_depth_png, files.existing(folder / depth[0]), UNITS_PER_METER)
        image = files.existing(folder / file)
        frames.append(EvalFrame(image.stem, _cam_from_world(pose, folder), intrinsics, image, read_depth=read_depth))
    return make_scene(folder.name, frames, dropped=dropped)


def _cam_from_world(words: list[str], folder: Path) -> Tensor:  # [4, 4], float64; NaN where the line is no pose
    try:
        numbers = torch.tensor([float(word) for word in words], dtype=torch.float64)
    except ValueError:
        raise UserError(f"{folder / 'groundtruth.txt'}: {' '.join(words)!r} is not a pose; fetch it again") from None
    world_from_cam = torch.eye(4, dtype=torch.float64)
    x, y, z, w = numbers[3:]
    world_from_cam[:3, :3] = rotation_from_quaternion(torch.stack([w, x, y, z]))
    world_from_cam[:3, 3] = numbers[:3]
    return invert_rigid(world_from_cam)


def _read_table(path: Path, columns: int) -> list[tuple[float, list[str]]]:
    """Lines of a file, sorted by time; without comments."""
    table = []
    for line in files.read_text(path).splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            table.append((float(words[0]), words[1:columns]))
        except ValueError:
            raise UserError(f"{path}: {line[:60]!r} does not begin with a timestamp; fetch it again") from None
        if len(words) < columns:
            raise UserError(f"{path}: {line[:60]!r}, expected {columns} columns; fetch it again")
    return sorted(table)


def _nearest(table: list[tuple[float, list[str]]], time: float) -> list[str] | None:
    i = bisect_left(table, time, key=lambda row: row[0])
    near = min(table[max(0, i - 1) : i + 1], key=lambda row: abs(row[0] - time), default=None)
    return near[1] if near is not None and abs(near[0] - time) <= MAX_TIME_GAP_S else None
