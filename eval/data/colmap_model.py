"""Read COLMAP models, text or binary, without COLMAP: ``cameras``, ``images`` and ``points3D`` (.txt or .bin).

The format is described at https://colmap.github.io/format.html : ``cam_from_world`` with OpenCV axes, pixels with the
first centre at (0.5, 0.5), which are the package's conventions too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data import files

# By the id used in binary files: name and number of parameters
CAMERA_MODELS = (
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
)
_PERSPECTIVE = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
_ONE_FOCAL = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")


@dataclass(frozen=True)
class ColmapCamera:
    """A camera of a model; `params` are in COLMAP's order."""

    model: str
    size: tuple[int, int]  # height, width
    params: tuple[float, ...]

    def intrinsics(self) -> Tensor | None:  # [3, 3], float64
        """None if the lens has distortion.

        Raises:
            ValueError: If focal length or principal point are not finite numbers.
        """
        single = self.model in _ONE_FOCAL
        count = 3 if single else 4
        if self.model not in _PERSPECTIVE or any(k != 0.0 for k in self.params[count:]):
            return None
        fx, fy, cx, cy = (self.params[0], *self.params[:3]) if single else self.params[:4]
        intrinsics = torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)
        if not intrinsics.isfinite().all() or min(fx, fy) <= 0:
            raise UserError(f"the COLMAP model has a {self.model} camera with invalid parameters {self.params}")
        return intrinsics


@dataclass(frozen=True)
class ColmapImage:
    """A registered image of a model."""

    name: str
    camera_id: int
    cam_from_world: Tensor  # [4, 4], float64


def find_model(folder: Path) -> Path | None:
    """The folder of the model: the given one, its ``sparse/0``, ``sparse`` or ``colmap/sparse/0``, or None."""
    for place in ("", "sparse/0", "sparse", "colmap/sparse/0"):
        for suffix in (".bin", ".txt"):
            if all((folder / place / f"{part}{suffix}").is_file() for part in ("cameras", "images")):
                return folder / place
    return None


def read_model(folder: Path) -> tuple[dict[int, ColmapCamera], list[ColmapImage]]:
    """Read cameras by id, and images sorted by name.

    Raises:
        ValueError: The files are damaged.
    """
    binary = (folder / "cameras.bin").is_file()
    try:
        cameras = _binary_cameras(folder) if binary else _text_cameras(folder)
        images = _binary_images(folder) if binary else _text_images(folder)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} holds a damaged COLMAP model ({error}); export it again") from None
    missing = sorted({image.camera_id for image in images} - set(cameras))
    if missing:
        raise UserError(f"{folder} has images with undefined cameras {missing}; export it again")
    return cameras, sorted(images, key=lambda image: image.name)


def has_points(folder: Path) -> bool:
    """Whether the model has a file of 3D points."""
    return any((folder / f"points3D{suffix}").is_file() for suffix in (".bin", ".txt"))


def read_points(folder: Path) -> Tensor:  # [N, 3], float32
    """Read the triangulated points.

    Raises:
        ValueError: The file is damaged, or has no points.
    """
    path = folder / "points3D.bin"
    if path.is_file():
        data, offset, rows = path.read_bytes(), 8, []
        try:
            for _ in range(struct.unpack_from("<Q", data)[0]):
                rows.append(struct.unpack_from("<3d", data, offset + 8))
                offset += 51 + 8 * struct.unpack_from("<Q", data, offset + 43)[0]
        except struct.error:
            offset = len(data) + 1
        if offset > len(data):
            raise UserError(f"{path} is truncated; export it again")
    else:
        path = folder / "points3D.txt"
        try:
            rows = [tuple(map(float, line.split()[1:4])) for line in _lines(path) if line]
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); export it again") from None
    points = torch.tensor(rows, dtype=torch.float32)
    if points.shape != (len(rows), 3) or not rows or not points.isfinite().all():
        raise UserError(f"{path} holds no 3D points; leave the scene out")
    return points


def rotation_from_quaternion(
    quaternion: Tensor,  # [4]: w, x, y, z; of any length
) -> Tensor:  # [3, 3], float64; NaN where the quaternion is zero
    """Rotation matrix of a quaternion."""
    quaternion = quaternion.double()
    w, x, y, z = (quaternion / quaternion.norm()).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def _image(name: str, camera_id: int, numbers: tuple[float, ...]) -> ColmapImage:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation_from_quaternion(torch.tensor(numbers[:4], dtype=torch.float64))
    pose[:3, 3] = torch.tensor(numbers[4:7], dtype=torch.float64)
    return ColmapImage(name, camera_id, pose)


def _lines(path: Path) -> Iterator[str]:
    """Lines except comments. Empty lines count: an image without points has one."""
    return (line.strip() for line in files.read_text(path).splitlines() if not line.lstrip().startswith("#"))


def _text_cameras(folder: Path) -> dict[int, ColmapCamera]:
    cameras, counts = {}, dict(CAMERA_MODELS)
    for line in filter(None, _lines(folder / "cameras.txt")):
        with _readable(folder / "cameras.txt", line, "CAMERA_ID MODEL WIDTH HEIGHT PARAMS"):
            number, model, width, height, *words = line.split()
            params = tuple(map(float, words))
            if len(params) != counts.get(model, len(params)):
                raise ValueError(f"{model} has {counts[model]} parameters, not {len(params)}")
            cameras[int(number)] = ColmapCamera(model, (int(height), int(width)), params)
    return cameras


@contextmanager
def _readable(path: Path, line: str, wanted: str) -> Iterator[None]:
    """Report for an unreadable line where it is, and the expected format."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: {line[:60]!r}, expected {wanted} ({error}); export the model again") from None


def _text_images(folder: Path) -> list[ColmapImage]:
    images, lines = [], _lines(folder / "images.txt")
    for line in lines:
        if line:
            with _readable(folder / "images.txt", line, "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"):
                words = line.split(maxsplit=9)
                images.append(_image(words[9], int(words[8]), tuple(float(word) for word in words[1:8])))
            next(lines, None)  # its points
    return images


def _binary_cameras(folder: Path) -> dict[int, ColmapCamera]:
    data, offset, cameras = (folder / "cameras.bin").read_bytes(), 8, {}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, model, width, height = struct.unpack_from("<iiQQ", data, offset)
        if not 0 <= model < len(CAMERA_MODELS):
            raise UserError(f"{folder} has a camera of unknown model {model}; undistort it, or convert it to text")
        name, count = CAMERA_MODELS[model]
        cameras[number] = ColmapCamera(name, (height, width), struct.unpack_from(f"<{count}d", data, offset + 24))
        offset += 24 + 8 * count
    return cameras


def _binary_images(folder: Path) -> list[ColmapImage]:
    data, offset, images = (folder / "images.bin").read_bytes(), 8, []
    for _ in range(struct.unpack_from("<Q", data)[0]):
        numbers = struct.unpack_from("<7d", data, offset + 4)
        (camera_id,) = struct.unpack_from("<i", data, offset + 60)
        end = data.find(b"\0", offset + 64)
        if end < 0:
            raise UserError(f"{folder / 'images.bin'} is cut off; export it again")
        images.append(_image(data[offset + 64 : end].decode(), camera_id, numbers))
        offset = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
        if offset > len(data):
            raise UserError(f"{folder / 'images.bin'} is cut off; export it again")
    return images


def thin_prism_fisheye_pixels(
    rays: np.ndarray,  # [..., 2], x / z and y / z
    params: tuple[float, ...],  # fx, fy, cx, cy, k1, k2, p1, p2, k3, k4, sx1, sy1
) -> np.ndarray:  # [..., 2]
    """Project rays with COLMAP's THIN_PRISM_FISHEYE camera, the lens model of ETH3D's photographs."""
    fx, fy, cx, cy, k1, k2, p1, p2, k3, k4, sx1, sy1 = params
    radius = np.linalg.norm(rays, axis=-1)
    bent = np.where(radius > 1e-8, np.arctan(radius) / np.maximum(radius, 1e-8), 1.0)
    x, y = rays[..., 0] * bent, rays[..., 1] * bent
    r2 = x * x + y * y
    radial = r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    u = x + x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + sx1 * r2
    v = y + y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) + sy1 * r2
    return np.stack([fx * u + cx, fy * v + cy], axis=-1)
