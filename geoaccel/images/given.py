"""What is known of images beyond pixels: poses, intrinsics and depth from files, brought to the network input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.conditions import KINDS, Conditions
from geoaccel.errors import UserError
from geoaccel.images.read import one_line
from geoaccel.images.transform import ImageTransform
from geoaccel.registry import unknown

MILLIMETRES = 1000.0
PIXEL_SHIFT = 0.5
"""From intrinsics that count pixel centres from 0, as those in ``poses.json``, to ours."""
OPENCV_FROM_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


class ImagesRead(Protocol):
    """An :class:`geoaccel.images.load.ImageBatch`, or what stands for one."""

    names: list[str]
    transforms: list[ImageTransform]


def load_conditions(
    batch: ImagesRead,
    *,
    poses: str | Path | None = None,
    intrinsics: str | Path | None = None,
    depths: str | Path | None = None,
) -> Conditions:
    """Read what is known of images; frames that a file does not name stay unknown.

    Args:
        batch: The images.
        poses: ``transforms.json`` (nerfstudio's, ``transform_matrix`` of each frame), or ``poses.json``: ``frames``
            with ``file`` and ``extrinsic``, which is ``cam_from_world`` [3, 4] with OpenCV axes.
        intrinsics: The same kinds of file (``fl_x fl_y cx cy`` of all or of each frame; ``intrinsic`` [3, 3] with pixel
            centres at whole numbers), or ``f`` or ``fx,fy,cx,cy`` of all images, in their pixels.
        depths: Folder with a map for each image, named like it: ``.npy`` in the unit of the poses, or ``.png`` of
            16 bits in millimetres, where the unit is the metre. 0 is unknown; other sizes of the same aspect are
            resized.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If one cannot be read, or names none of the images.
    """
    found: dict[str, Any] = {}
    if poses is not None:
        found["poses"], found["has_pose"] = _collect(batch, _poses(_document(poses)), Path(poses), torch.eye(4))
    if intrinsics is not None:
        values = _numbers(str(intrinsics), batch)
        if values is None:
            values = _intrinsics(_document(intrinsics))
        rows, found["has_intrinsics"] = _collect(batch, values, Path(intrinsics), torch.eye(3))
        pairs = zip(rows, batch.transforms, strict=True)
        found["intrinsics"] = torch.stack([transform.intrinsics_to_network(matrix) for matrix, transform in pairs])
    if depths is not None:
        found["depths"], found["has_depth"] = _depths(Path(depths).expanduser(), batch)
    return Conditions(**found)


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse a kind of condition that does not exist.

    Raises:
        ValueError: Naming it.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(unknown("condition", name, list(KINDS)))


def _document(path: str | Path) -> dict[str, Any]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected transforms.json or poses.json")
    try:
        document = json.loads(path.read_text(errors="replace"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); export it again") from None
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path} has no list of frames; expected transforms.json or poses.json")
    return document


def _name(frame: Mapping[str, Any]) -> str:
    return str(frame.get("file", frame.get("file_path", "")))


def _poses(document: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for frame in document["frames"]:
        if "extrinsic" in frame:
            found[_name(frame)] = to_homogeneous(_matrix(frame["extrinsic"], 4, _name(frame)))
        elif "transform_matrix" in frame:
            world_from_cam = to_homogeneous(_matrix(frame["transform_matrix"], 4, _name(frame)))
            found[_name(frame)] = invert_rigid(world_from_cam @ OPENCV_FROM_OPENGL)
    return found


def _intrinsics(document: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for frame in document["frames"]:
        camera = {**document, **frame}
        if "intrinsic" in frame:
            found[_name(frame)] = _matrix(frame["intrinsic"], 3, _name(frame)).clone()
            found[_name(frame)][:2, 2] += PIXEL_SHIFT
        elif {"fl_x", "cx", "cy"} <= camera.keys():
            numbers = [camera["fl_x"], camera.get("fl_y", camera["fl_x"]), camera["cx"], camera["cy"]]
            found[_name(frame)] = _pinhole(*(float(number) for number in numbers))
    return found


def _pinhole(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def _matrix(values: Any, columns: int, name: str) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, columns)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the camera of {name} is no matrix with {columns} columns ({one_line(error)})") from None


def _numbers(text: str, batch: ImagesRead) -> dict[str, Tensor] | None:
    """Intrinsics of all images from one or four numbers; None for a path."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(numbers) not in (1, 4):
        raise UserError(f"intrinsics {text!r} are {len(numbers)} numbers; give f, or fx,fy,cx,cy, in pixels, or a file")
    found = {}
    for name, transform in zip(batch.names, batch.transforms, strict=True):
        height, width = transform.original_size
        found[name] = _pinhole(*(numbers if len(numbers) == 4 else (*numbers * 2, width / 2, height / 2)))
    return found


def _collect(
    batch: ImagesRead, values: Mapping[str, Tensor], path: Path, otherwise: Tensor
) -> tuple[Tensor, Tensor]:  # [S, ...] float32, and [S] bool
    """The value of each image, by its name or else by the last part of it."""
    short = {PurePath(name).name: value for name, value in values.items()}
    stems = {PurePath(name).stem: value for name, value in values.items()}
    found = []
    for name in batch.names:
        last = PurePath(name)
        found.append(values.get(name, short.get(last.name, stems.get(last.stem))))
    if all(value is None for value in found):
        named = ", ".join(list(values)[:3]) or "no frame with one"
        raise UserError(f"{path} names none of the images (first {batch.names[0]}); it has {named}")
    rows = torch.stack([otherwise if value is None else value.float() for value in found])
    return rows, torch.tensor([value is not None for value in found])


def _depths(folder: Path, batch: ImagesRead) -> tuple[Tensor, Tensor]:  # [S, H, W], [S] bool
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of depths at {folder}")
    maps, known = [], []
    for name, transform in zip(batch.names, batch.transforms, strict=True):
        stem = folder / PurePath(name).stem
        candidates = (stem.with_name(f"{stem.name}{end}") for end in (".npy", ".png"))
        path = next((path for path in candidates if path.is_file()), None)
        known.append(path is not None)
        maps.append(torch.zeros(transform.network_size) if path is None else _depth(path, transform))
    if not any(known):
        first = PurePath(batch.names[0]).stem
        raise UserError(f"{folder} holds no depth of any image; expected {first}.npy or {first}.png")
    return torch.stack(maps), torch.tensor(known)


def _depth(path: Path, transform: ImageTransform) -> Tensor:  # [H, W]
    try:
        if path.suffix == ".npy":
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
