"""File reading shared by the dataset readers: images, depth maps, masks, matrices, point clouds.

Every error says in one line what is wrong with the file and what to do. Functions are at module level, so that a
`functools.partial` of one can be stored in a frame and sent to another process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.read import one_line, opened
from geoaccel.images.read import read_image as _read_pil

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = (None, 0, 1)


def existing(path: Path) -> Path:
    """The path, if the file exists.

    Raises:
        FileNotFoundError: If it does not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; fetch the rest of the dataset, or leave the scene out")
    return path


def folder_of(root: str | Path | None, what: str) -> Path:
    """The root folder of a dataset, if it exists.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    # A folder name that is a number is parsed as a number
    folder = None if root is None else Path(str(root))
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"no folder {root}; set data.root to {what}")
    return folder


def folders_with(folder: Path, marker: str, otherwise: str) -> list[Path]:
    """Direct subfolders that contain a marker, in order of name.

    Args:
        folder: Folder of the dataset.
        marker: File that marks a folder as a scene; a folder if it ends in a slash.
        otherwise: What to do if none is found, for the message.

    Raises:
        FileNotFoundError: If none is found.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{marker}"))
    if not found:
        raise FileNotFoundError(f"no */{marker} under {folder}; {otherwise}")
    return found


def read_text(path: Path) -> str:
    """Text of a file, without a UTF-8 byte order mark.

    Raises:
        ValueError: If it is not text.
    """
    try:
        return existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error.reason}); fetch it again") from None


def image_size(path: Path) -> tuple[int, int]:  # height, width
    """Size of an image, from its header.

    Raises:
        ValueError: If it is not an image, or EXIF rotates it: ground truth refers to the pixels as stored.
    """
    with _opened(path) as image:
        if image.getexif().get(_EXIF_ORIENTATION) not in _UPRIGHT:
            raise UserError(f"{path} has an EXIF orientation, which its pose ignores; remove that tag from the file")
        return image.height, image.width


def read_rgb(path: Path) -> Tensor:  # [3, H, W] in [0, 1]
    """Decode a photograph."""
    image_size(path)
    return torch.from_numpy(np.array(_read_pil(path).convert("RGB"))).movedim(-1, 0).float() / 255.0


def read_mask(path: Path) -> Tensor:  # [H, W], bool
    """Decode a mask: bright is inside."""
    return torch.from_numpy(_decoded(path, "L") >= 128)


def read_depth_png(
    path: Path,
    units_per_meter: float,
    *,
    max_depth: float = float("inf"),
    invalid: tuple[int, ...] = (),
) -> Tensor:  # [H, W], float32, metres, 0 where it is unknown
    """Decode a 16-bit depth map.

    Args:
        path: Greyscale PNG.
        units_per_meter: Stored value of one metre.
        max_depth: In metres; larger depths are unknown.
        invalid: Stored values that mean "unknown", besides 0.

    Raises:
        ValueError: If it is not a 16-bit greyscale image.
    """
    stored = _decoded(path)
    if stored.ndim != 2 or stored.dtype not in (np.uint16, np.int32):
        raise UserError(f"{path} holds {stored.dtype} values {list(stored.shape)}; a depth map is a 16-bit grey PNG")
    depth = stored.astype(np.float64) / units_per_meter
    known = (stored > 0) & (depth <= max_depth) & ~np.isin(stored, invalid)
    return torch.from_numpy(np.where(known, depth, 0.0).astype(np.float32))


def clean_depth(
    depth: np.ndarray,  # [H, W]
) -> Tensor:  # [H, W], float32
    """Depth with 0 where it is not finite and positive."""
    return torch.from_numpy(np.where(np.isfinite(depth) & (depth > 0), depth, 0.0).astype(np.float32))


def read_matrix(path: Path, shape: tuple[int, int]) -> Tensor:  # `shape`, float64, entries may be NaN or infinite
    """Read a matrix from a text file, or its top left block of that shape.

    Raises:
        ValueError: If the file has anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file
            matrix = np.loadtxt(existing(path), ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a matrix ({one_line(error)}); fetch it again") from None
    if matrix.shape[0] < shape[0] or matrix.shape[1] < shape[1]:
        raise UserError(f"{path} has a matrix {list(matrix.shape)}, expected {list(shape)}; fetch it again")
    return torch.from_numpy(matrix[: shape[0], : shape[1]].astype(np.float64))


def read_points(path: Path) -> Tensor:  # [N, 3], float32
    """Vertices of a point cloud or a mesh (PLY).

    Raises:
        ValueError: If it is not a point cloud, or empty.
    """
    import trimesh

    try:
        cloud: Any = trimesh.load(existing(path), process=False)
        points = np.array(cloud.vertices, dtype=np.float32)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a point cloud ({one_line(error)}); fetch it again") from None
    if len(points) == 0 or not np.isfinite(points).all():
        raise UserError(f"{path} has no points, or NaN; fetch it again")
    return torch.from_numpy(points)


def _decoded(path: Path, mode: str | None = None) -> np.ndarray:
    with _opened(path) as image:
        try:
            return np.array(image if mode is None else image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be decoded ({one_line(error)}); fetch it again") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        try:
            image = stack.enter_context(opened(existing(path)))
        except (FileNotFoundError, UserError):
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} is not a readable image ({one_line(error)}); fetch it again") from None
        yield image
