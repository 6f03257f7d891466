"""What is known of images beyond pixels: poses, intrinsics and depth from files, brought to the network input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.conditions import KINDS, Conditions
from geoaccel.errors import UserError
from geoaccel.images.calibration import IntrinsicsGiven, read_intrinsics
from geoaccel.images.documents import frame_name, matched, read_document, read_matrix
from geoaccel.images.read import one_line
from geoaccel.images.transform import ImageTransform
from geoaccel.registry import unknown

DEPTH_SUFFIXES = (".npy", ".png", ".NPY", ".PNG")
MILLIMETRES = 1000.0
OPENCV_FROM_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


class ImagesRead(Protocol):
    """An :class:`geoaccel.images.load.ImageBatch`, or what stands for one."""

    names: list[str]
    transforms: list[ImageTransform]


def load_conditions(
    batch: ImagesRead,
    *,
    poses: str | Path | None = None,
    intrinsics: IntrinsicsGiven | None = None,
    depths: str | Path | None = None,
) -> Conditions:
    """Read what is known of images; frames that a file does not name stay unknown.

    Args:
        batch: The images.
        poses: ``transforms.json`` (nerfstudio's, ``transform_matrix`` of each frame), or ``poses.json``: ``frames``
            with ``file`` and ``extrinsic``, which is ``cam_from_world`` [3, 4] with OpenCV axes.
        intrinsics: As :func:`geoaccel.images.calibration.read_intrinsics` takes them.
        depths: Folder with a map for each image, named like it: ``.npy`` in the unit of the poses, or ``.png`` of
            16 bits in millimetres, where the unit is the metre. 0 is unknown; other sizes of the same aspect are
            resized.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If one cannot be read, or names none of the images.
    """
    found: dict[str, Any] = {}
    if poses is not None:
        known = matched(read_poses(read_document(poses)), batch.names, poses)
        found["poses"], found["has_pose"] = _rows(known, torch.eye(4))
    if intrinsics is not None:
        known = read_intrinsics(intrinsics, batch.names, [transform.original_size for transform in batch.transforms])
        rows, found["has_intrinsics"] = _rows(known, torch.eye(3))
        pairs = zip(rows, batch.transforms, strict=True)
        found["intrinsics"] = torch.stack([transform.intrinsics_to_network(matrix) for matrix, transform in pairs])
    if depths is not None:
        found["depths"], found["has_depth"] = _depths(depth_folder(depths), batch)
    return Conditions(**found)


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse a kind of condition that does not exist.

    Raises:
        ValueError: Naming it.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(unknown("condition", name, list(KINDS)))


def read_poses(document: Mapping[str, Any]) -> dict[str, Tensor]:
    """``cam_from_world`` [4, 4] of every frame of a file of cameras that has one, float64.

    Raises:
        ValueError: If one is no matrix [3, 4] or [4, 4].
    """
    found = {}
    for frame in document["frames"]:
        if "extrinsic" in frame:
            found[frame_name(frame)] = _pose(frame["extrinsic"], frame_name(frame))
        elif "transform_matrix" in frame:
            world_from_cam = _pose(frame["transform_matrix"], frame_name(frame))
            found[frame_name(frame)] = invert_rigid(world_from_cam @ OPENCV_FROM_OPENGL)
    return found


def _pose(values: Any, name: str) -> Tensor:  # [4, 4]
    matrix = read_matrix(values, 4, name)
    if matrix.shape[0] not in (3, 4):
        raise UserError(f"the pose of {name} is {list(matrix.shape)}; expected [3, 4] or [4, 4]")
    return to_homogeneous(matrix)


def _rows(found: Sequence[Tensor | None], otherwise: Tensor) -> tuple[Tensor, Tensor]:  # [S, ...] float32, [S] bool
    """What is known of each image, and of which ones."""
    rows = torch.stack([otherwise if value is None else value.float() for value in found])
    return rows, torch.tensor([value is not None for value in found])


def depth_folder(depths: str | Path) -> Path:
    """The folder of depths.

    Raises:
        FileNotFoundError: If it is missing.
    """
    folder = Path(depths).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of depths at {folder}")
    return folder


def find_depths(folder: Path, names: Sequence[str]) -> list[Path | None]:
    """The map of each image; None where there is none.

    Raises:
        ValueError: If there is none of any image.
    """
    stems = [PurePath(name).stem for name in names]
    candidates = ([folder / f"{stem}{end}" for end in DEPTH_SUFFIXES] for stem in stems)
    found = [next((path for path in paths if path.is_file()), None) for paths in candidates]
    if all(path is None for path in found):
        raise UserError(f"{folder} holds no depth of any image; expected {stems[0]}.npy or {stems[0]}.png")
    return found


def _depths(folder: Path, batch: ImagesRead) -> tuple[Tensor, Tensor]:  # [S, H, W], [S] bool
    found = find_depths(folder, batch.names)
    pairs = zip(found, batch.transforms, strict=True)
    maps = [torch.zeros(one.network_size) if path is None else _depth(path, one) for path, one in pairs]
    return torch.stack(maps), torch.tensor([path is not None for path in found])


def _depth(path: Path, transform: ImageTransform) -> Tensor:  # [H, W]
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path).astype(np.float32)
        else:
            with Image.open(path) as picture:
                if not picture.mode.startswith("I"):
                    raise UserError(f"{path} is a picture of 8 bits; depth has 16 bits, in millimetres, or is .npy")
                values = np.asarray(picture).astype(np.float32) / MILLIMETRES
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as depth ({one_line(error)}); export it again") from None
    height, width = transform.original_size
    if values.ndim != 2 or abs(values.shape[1] * height / (values.shape[0] * width) - 1) > 0.02:
        raise UserError(
            f"depth {path} is {list(values.shape)}, its image {height} x {width} (height x width); give a map of "
            "the same aspect"
        )
    return _resampled(transform, (values.shape[0], values.shape[1])).nearest(torch.from_numpy(values))


def _resampled(transform: ImageTransform, size: tuple[int, int]) -> ImageTransform:
    """The same way to the network input from a map of another size."""
    (height, width), (scale_x, scale_y) = transform.original_size, transform.scale
    scale = (scale_x * width / size[1], scale_y * height / size[0])
    return ImageTransform(size, transform.network_size, scale, transform.offset)
