"""Known poses, intrinsics and depth from files, converted to the network input."""

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
"""Next to 16-bit maps: the number of steps per unit, if not `MILLIMETRES`."""
MILLIMETRES = 1000.0
OPENCV_FROM_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


class ImagesRead(Protocol):
    """An :class:`geoaccel.images.load.ImageBatch`, or an object with the same interface."""

    names: list[str]
    transforms: list[ImageTransform]


def load_conditions(
    batch: ImagesRead,
    *,
    poses: str | Path | None = None,
    intrinsics: IntrinsicsGiven | None = None,
    depths: str | Path | None = None,
) -> Conditions:
    """Read known conditions of images; frames that a file does not name stay unknown.

    Args:
        batch: The images.
        poses: ``transforms.json`` (nerfstudio's, ``transform_matrix`` of each frame), or ``poses.json``: ``frames``
            with ``file`` and ``extrinsic``, which is ``cam_from_world`` [3, 4] with OpenCV axes.
        intrinsics: As :func:`geoaccel.images.calibration.read_intrinsics` takes them.
        depths: Folder with a map for each image, named like it: ``cam0/a.npy`` for ``cam0/a.jpg``, or ``a.npy`` if no
            other image is named ``a``. ``.npy`` in the unit of the poses, or 16-bit ``.png`` in millimetres (the unit
            is then the metre), or in the steps given by ``scale.json`` next to them (``steps_per_unit``), as written by
            our format ``depth``. 0 is unknown; other sizes of the same aspect are resized.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If one cannot be read, names none of the images, or is ambiguous.
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
    """``cam_from_world`` [4, 4] of every frame of a camera file that has one, float64.

    Raises:
        ValueError: If one is not a matrix [3, 4] or [4, 4].
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
    """The values for each image, and the images for which they are known."""
    rows = torch.stack([otherwise if value is None else value.float() for value in found])
    return rows, torch.tensor([value is not None for value in found])


def depth_folder(depths: str | Path) -> Path:
    """The folder of depths.

    Raises:
        FileNotFoundError: If it is missing.
    """
    folder = Path(depths).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of depths {folder} does not exist; check the path")
    return folder


def find_depths(folder: Path, names: Sequence[str]) -> list[Path | None]:
    """The map of each image, named as in :func:`load_conditions`; None if there is none.

    Raises:
        ValueError: If there is no map for any image, or one is ambiguous.
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
            raise UserError(f"{path} may belong to {first} or {second}; name it after its image, such as {wanted}")
        found[i] = path
    if all(path is None for path in found):
        raise UserError(f"{folder} contains no depth of any image; expected {expected[0]}.npy or {expected[0]}.png")
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
    """Steps per unit of the 16-bit maps in a folder.

    Args:
        folder: Folder of the maps.
        maps: Those that are used; ``scale.json`` is ignored if all of them are ``.npy``.

    Raises:
        ValueError: If its ``scale.json`` does not give them.
    """
    path = folder / SCALE_FILE
    if not path.is_file() or not any(one is not None and one.suffix.lower() == ".png" for one in maps):
        return MILLIMETRES
    try:
        steps = float(json.loads(path.read_text(encoding="utf-8-sig"))[STEPS_PER_UNIT])
    except (ValueError, KeyError, TypeError):
        steps = math.nan
    if not 0 < steps < math.inf:
        raise UserError(f"{path} has no {STEPS_PER_UNIT}; write the depths again, or remove it for millimetres")
    return steps


def _depth(path: Path, transform: ImageTransform, steps: float) -> Tensor:  # [H, W]
    try:
        if path.suffix.lower() == ".npy":
            values = np.asarray(np.load(path), np.float32)
        else:
            with Image.open(path) as picture:
                if not picture.mode.startswith("I"):
                    raise UserError(f"{path} is an 8-bit image; give depth as 16-bit PNG in millimetres, or as .npy")
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
    """The same mapping to the network input, for a map of another size."""
    (height, width), (scale_x, scale_y) = transform.original_size, transform.scale
    scale = (scale_x * width / size[1], scale_y * height / size[0])
    return ImageTransform(size, transform.network_size, scale, transform.offset)
