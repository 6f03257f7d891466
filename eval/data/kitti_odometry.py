"""KITTI odometry: drives through Karlsruhe, poses from GPS and inertial sensors (Geiger et al., CVPR 2012).

    <root>/sequences/00/image_2/000000.png   left colour camera, about 1241 x 376, rectified
                        image_0/000000.png   left grey camera; used if there is no image_2
                        calib.txt            "P0: ... P3: ...", projections 3 x 4 of the rectified cameras
    <root>/poses/00.txt                      world_from_cam of the left grey camera, 3 x 4 a line, metres

From https://www.cvlibs.net/datasets/kitti/eval_odometry.php : colour 65 GB, grey 22 GB, calibration and poses a few
megabytes. Non-commercial use only (CC BY-NC-SA 3.0). Ten images a second; 271 to 4,661 a sequence.

Poses are published for sequences 00 to 10; those of 11 to 21 are withheld for the evaluation server. They are poses of
the grey camera (P0); those of the colour camera, a few centimetres beside it, follow from the translation in P2.
Principal points have the first pixel's centre at 0, so half a pixel is added. There is no depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_candidates

CAMERAS = ("image_2", "image_0")
PIXEL_SHIFT = 0.5
FIRST_WITHOUT_TRUTH = 11
NO_TRUTH = "KITTI publishes no poses of sequences 11 to 21, which its server scores; choose from 00 to 10"


@reader("kitti_odometry", is_sequence=True)
def read(root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None) -> Iterator[EvalScene]:
    """Yield the sequences in order of number; 11 to 21, which have no ground truth, are skipped.

    Args:
        root: Folder with ``sequences`` and ``poses``.
        scenes: Only these sequences ("00").
        on_skip: Called with each sequence that is left out.

    Raises:
        FileNotFoundError: ``root`` is not the dataset.
        ValueError: A named sequence does not exist or has no published ground truth.
    """
    folder = files.folder_of(root, "the KITTI folder that holds sequences and poses")
    found = files.folders_with(folder / "sequences", "calib.txt", "give the folder that holds sequences and poses")
    if not (folder / "poses").is_dir():
        raise FileNotFoundError(f"no folder {folder / 'poses'}; fetch the ground truth poses of KITTI odometry, too")
    for name in sorted({scenes} if isinstance(scenes, str) else scenes or ()):
        if _has_no_truth(name):
            raise UserError(f"sequence {name}: {NO_TRUTH}")
    candidates = [
        Candidate(place.name, None, partial(_read_sequence, place, folder / "poses" / f"{place.name}.txt"))
        for place in found
        if not _has_no_truth(place.name)
    ]
    if not candidates:
        raise UserError(f"{folder / 'sequences'} holds none of 00 to 10: {NO_TRUTH}")
    return read_candidates(candidates, scenes, on_skip)


def _has_no_truth(name: str) -> bool:
    return name.isdecimal() and int(name) >= FIRST_WITHOUT_TRUTH


def _read_sequence(folder: Path, poses: Path) -> EvalScene:
    camera = next((name for name in CAMERAS if (folder / name).is_dir()), None)
    images = sorted((folder / camera).glob("*.png")) if camera else []
    if camera is None or not images:
        raise FileNotFoundError(f"no image_2/*.png and no image_0/*.png in {folder}; unpack the images there")
    world_from_grey = _rows(poses)
    if len(images) != len(world_from_grey):
        raise UserError(
            f"{folder / camera} and {poses}: {len(images)} images and {len(world_from_grey)} poses; fetch both again"
        )
    intrinsics, from_grey = _camera(folder / "calib.txt", f"P{camera[-1]}")
    return make_scene(
        folder.name,
        [
            EvalFrame(image.stem, from_grey @ invert_rigid(pose), intrinsics, image)
            for image, pose in zip(images, world_from_grey, strict=True)
        ],
    )


def _rows(path: Path) -> Tensor:  # [S, 4, 4], float64
    """Poses of a file; numbers may be NaN or infinite."""
    text = files.read_text(path)
    try:
        numbers = torch.tensor([float(word) for word in text.split()], dtype=torch.float64)
        return to_homogeneous(numbers.view(-1, 3, 4))
    except (ValueError, RuntimeError):
        raise UserError(f"{path} does not have twelve numbers per line; fetch it again") from None


def _camera(path: Path, name: str) -> tuple[Tensor, Tensor]:  # [3, 3] and [4, 4], float64
    """Intrinsics of a camera, and its pose relative to the grey camera: cam_from_grey."""
    for line in files.read_text(path).splitlines():
        words = line.replace(":", " ").split()
        if words[:1] != [name]:
            continue
        try:
            projection = torch.tensor([float(word) for word in words[1:]], dtype=torch.float64).view(3, 4)
        except (ValueError, RuntimeError):
            raise UserError(f"{path} has the line {line[:60]!r}; expected twelve numbers; fetch it again") from None
        intrinsics = projection[:, :3].clone()
        if not projection.isfinite().all() or (intrinsics.diagonal() <= 0).any():
            raise UserError(f"{path}: {name} has no positive, finite focal lengths; fetch it again")
        from_grey = torch.eye(4, dtype=torch.float64)
        from_grey[:3, 3] = torch.linalg.solve(intrinsics, projection[:, 3])
        intrinsics[:2, 2] += PIXEL_SHIFT
        return intrinsics, from_grey
    raise UserError(f"{path} has no line {name}; fetch it again")
