"""Known intrinsics, from numbers or files, in pixels of the original photographs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.documents import frame_name, matched, read_document, read_matrix
from geoaccel.images.read import one_line

logger = logging.getLogger(__name__)

PIXEL_SHIFT = 0.5
"""Offset from intrinsics with pixel centres at integers, as in ``poses.json``, to ours."""
SAME_ASPECT = 0.01
"""Largest relative difference in aspect at which a calibration at another size applies to the same image."""
FOCAL_RANGE = (0.1, 100.0)
"""Bounds on focal length over the long side, fields of view of 157 to 0.6 degrees. Anything else is not in pixels."""
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")

IntrinsicsGiven: TypeAlias = str | Path | float | Sequence[float] | Tensor | np.ndarray


def read_intrinsics(
    given: IntrinsicsGiven, names: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[Tensor | None]:  # S of [3, 3]
    """Intrinsics of each image, pixel centres at half-integers; None if unknown.

    Args:
        given: ``f``, or ``fx,fy,cx,cy``, for all images, in pixels, as text or numbers; a tensor or array [3, 3] or
            [S, 3, 3]; or a JSON file with one camera (``fl_x fl_y cx cy``, or ``fx fy cx cy``) or with frames
            (``transforms.json``, ``poses.json``: ``intrinsic`` [3, 3] with pixel centres at integers). Intrinsics in a
            file for another size of the same aspect (``w``, ``h``) are scaled.
        names: Names of the images.
        sizes: Their (H, W).

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read or names none of the images, or the numbers cannot be pixels.
    """
    found: list[Tensor | None]
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given.copy()) if given.ndim > 1 else given.reshape(-1).tolist()
    if isinstance(given, Tensor):
        if given.shape not in ((3, 3), (len(names), 3, 3)):
            raise UserError(f"intrinsics are {list(given.shape)}; give [3, 3] for all images, or [{len(names)}, 3, 3]")
        found = list(given.detach().cpu().double().expand(len(names), 3, 3))
    elif (numbers := read_numbers(given)) is not None:
        found = [_of_numbers(numbers, size) for size in sizes]
    else:
        document = read_document(str(given), one_camera=True)
        if name := _distorted(document):
            logger.warning("lens distortion in the intrinsics of %s is ignored; undistort the photographs first", name)
        cameras = cameras_of(document, names)
        scaled = zip(matched(cameras, names, given), names, sizes, strict=True)
        found = [None if camera is None else _at_size(*camera, name, size) for camera, name, size in scaled]
    for matrix, name, (height, width) in zip(found, names, sizes, strict=True):
        if matrix is not None:
            _check_pixels(matrix, name, height, width)
    return found


def read_numbers(given: Any) -> list[float] | None:
    """One or four numbers; None for a path.

    Raises:
        ValueError: For another count, or an invalid focal length.
    """
    try:
        parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        return None
    if len(numbers) not in (1, 4):
        raise UserError(f"intrinsics {given!r} are {len(numbers)} numbers; give f or fx,fy,cx,cy in pixels, or a file")
    if not all(0 < focal < math.inf for focal in numbers[: len(numbers) // 2 or 1]):
        raise UserError(f"intrinsics {given!r}: focal lengths in pixels must be positive; give f or fx,fy,cx,cy")
    return numbers


def _of_numbers(numbers: Sequence[float], size: tuple[int, int]) -> Tensor:
    height, width = size
    fx, fy, cx, cy = numbers if len(numbers) == 4 else (numbers[0], numbers[0], width / 2, height / 2)
    return _pinhole(fx, fy, cx, cy)


def _distorted(document: Mapping[str, Any]) -> str | None:
    """The first camera of a file with lens distortion."""
    frames = document.get("frames", [{"file": "all images"}])
    cameras = ((frame_name(frame), {**document, **frame}) for frame in frames)
    return next((name for name, camera in cameras if any(camera.get(key) for key in DISTORTION)), None)


def cameras_of(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Tensor, Any, Any]]:
    """Matrix, width and height of every frame with a camera, by its name in the file; for one camera of all images.

    Raises:
        ValueError: If a camera is not numeric.
    """
    found = {}
    for frame in document.get("frames", [{"file": name} for name in names]):
        name, camera = frame_name(frame), {**document, **frame}
        if "intrinsic" in frame:
            matrix = read_matrix(frame["intrinsic"], 3, name).clone()
            if matrix.shape != (3, 3):
                raise UserError(f"the intrinsics of {name} are {list(matrix.shape)}; expected [3, 3]")
            matrix[:2, 2] += PIXEL_SHIFT
        elif (focal := camera.get("fl_x", camera.get("fx"))) is not None and {"cx", "cy"} <= camera.keys():
            try:
                other = camera.get("fl_y", camera.get("fy", focal))
                matrix = _pinhole(*(float(number) for number in (focal, other, camera["cx"], camera["cy"])))
            except (TypeError, ValueError) as error:
                raise UserError(f"the camera of {name} is not numeric ({one_line(error)}); export it again") from None
        else:
            continue
        found[name] = (matrix, camera.get("w"), camera.get("h"))
    return found


def _at_size(matrix: Tensor, width: Any, height: Any, name: str, size: tuple[int, int]) -> Tensor:  # [3, 3]
    """Scale intrinsics from the size in the file to that of the image."""
    numbers = isinstance(width, int | float) and isinstance(height, int | float)
    if not numbers or width <= 0 or height <= 0 or (height, width) == size:
        return matrix
    if abs(width * size[0] / (height * size[1]) - 1) > SAME_ASPECT:
        raise UserError(
            f"the intrinsics of {name} are for {width}x{height} pixels, but the image is {size[1]}x{size[0]}, with "
            "another aspect; give those of the photographs as they are"
        )
    return torch.diag(torch.tensor([size[1] / width, size[0] / height, 1.0], dtype=torch.float64)) @ matrix


def _check_pixels(matrix: Tensor, name: str, height: int, width: int) -> None:
    """Refuse values that cannot be pixels of an image; `geoaccel.conditions` refuses invalid cameras."""
    focal, centre = matrix[[0, 1], [0, 1]], matrix[:2, 2]
    low, high = (share * max(height, width) for share in FOCAL_RANGE)
    if ((focal > 0) & ((focal < low) | (focal > high))).any():
        raise UserError(
            f"the focal length {float(focal[0]):g} cannot be in pixels of {name} ({width}x{height}): allowed is "
            f"{low:g} to {high:g}; give pixels of the original photographs, not millimetres or fractions"
        )
    if (centre < 0).any() or centre[0] > width or centre[1] > height:
        raise UserError(
            f"the principal point {float(centre[0]):g},{float(centre[1]):g} is outside of {name} ({width}x{height}); "
            "give fx,fy,cx,cy in this order, in pixels of the original photographs"
        )


def _pinhole(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
