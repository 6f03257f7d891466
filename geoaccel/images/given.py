"""What is known of images beyond pixels: poses, intrinsics and depth from files, brought to the network input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.conditions import KINDS, Conditions
from geoaccel.errors import ARRAY_ERRORS, UserError
from geoaccel.images.calibration import IntrinsicsGiven, read_intrinsics
from geoaccel.images.documents import frame_name, matched, read_document, read_matrix
from geoaccel.images.read import one_line
from geoaccel.images.transform import ImageTransform
from geoaccel.registry import unknown

DEPTH_SUFFIXES = (".npy", ".png", ".NPY", ".PNG")
SCALE_FILE = "scale.json"
STEPS_PER_UNIT = "steps_per_unit"
"""Beside maps of 16 bits: how many of their steps make a unit, where that is not `MILLIMETRES`."""
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
        depths: Folder with a map for each image, named like it: ``cam0/a.npy`` for ``cam0/a.jpg``, or ``a.npy`` where
            no other image is named ``a``. ``.npy`` in the unit of the poses, or ``.png`` of 16 bits in millimetres,
            where the unit is the metre, or else in the steps that ``scale.json`` beside them says (``steps_per_unit``),
            as our format ``depth`` writes it. 0 is unknown; other sizes of the same aspect are resized.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If one cannot be read, names none of the images, or does not say which of several.
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
    """The map of each image, named as :func:`load_conditions` says; None where there is none.

    Raises:
        ValueError: If there is none of any image, or one may be of several.
    """
    bare = [PurePath(name).stem for name in names]
    bare_alike, expected = Counter(bare), map_stems(names)
    found = [_map(folder, stem) or _map(folder, name) for stem, name in zip(expected, names, strict=True)]
    own = set(found)
    for i, stem in enumerate(bare):
        path = None if found[i] is not None else _map(folder, stem)
        if path is None or path in own:
            continue
        if bare_alike[stem] > 1:
            first, second = [name for name, other in zip(names, bare, strict=True) if other == stem][:2]
            wanted = folder / f"{expected[i]}{path.suffix}"
            raise UserError(f"{path} may be of {first} or {second}; name it as its image, such as {wanted}")
        found[i] = path
    if all(path is None for path in found):
        raise UserError(f"{folder} holds no depth of any image; expected {expected[0]}.npy or {expected[0]}.png")
    return found


def map_stems(names: Sequence[str]) -> list[str]:
    """What the map of each image is called, up to its own suffix: like the image without one.

    The image's suffix stays where two differ in it alone, and everywhere where that would be the name of a third.
    """
    without = [PurePath(name).with_suffix("").as_posix() for name in names]
    alike = Counter(without)
    stems = [stem if alike[stem] == 1 else name for stem, name in zip(without, names, strict=True)]
    return stems if len(set(stems)) == len(stems) else list(names)


def _map(folder: Path, name: str) -> Path | None:
    """A map in a folder, by its name without suffix."""
    return next((path for end in DEPTH_SUFFIXES if (path := folder / f"{name}{end}").is_file()), None)


def _depths(folder: Path, batch: ImagesRead) -> tuple[Tensor, Tensor]:  # [S, H, W], [S] bool
    found = find_depths(folder, batch.names)
    pairs, steps = zip(found, batch.transforms, strict=True), read_steps(folder, found)
    maps = [torch.zeros(one.network_size) if path is None else _depth(path, one, steps) for path, one in pairs]
    return torch.stack(maps), torch.tensor([path is not None for path in found])


def read_steps(folder: Path, maps: Sequence[Path | None]) -> float:
    """Steps of 16-bit maps in a folder that make a unit.

    Args:
        folder: Of the maps.
        maps: Those that are used; where all of them are ``.npy`` the file does not count.

    Raises:
        ValueError: If its ``scale.json`` says none.
    """
    path = folder / SCALE_FILE
    if not path.is_file() or not any(one is not None and one.suffix.lower() == ".png" for one in maps):
        return MILLIMETRES
    try:
        steps = float(json.loads(path.read_text(encoding="utf-8-sig"))[STEPS_PER_UNIT])
    except (ValueError, KeyError, TypeError):
        steps = math.nan
    if not 0 < steps < math.inf:
        raise UserError(f"{path} says no {STEPS_PER_UNIT}; write the depths again, or remove it for millimetres")
    return steps


def _depth(path: Path, transform: ImageTransform, steps: float) -> Tensor:  # [H, W]
    try:
        if path.suffix.lower() == ".npy":
            values = np.asarray(np.load(path), np.float32)
        else:
            with Image.open(path) as picture:
                if not picture.mode.startswith("I"):
                    raise UserError(f"{path} is a picture of 8 bits; depth has 16 bits, in millimetres, or is .npy")
                values = np.asarray(picture).astype(np.float32) / steps
    except ARRAY_ERRORS as error:
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
