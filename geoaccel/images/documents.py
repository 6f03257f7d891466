"""Camera files (``transforms.json``, ``poses.json``), and matching of their frames to images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.names import paired
from geoaccel.images.read import one_line

Value = TypeVar("Value")


def read_document(path: str | Path, *, one_camera: bool = False) -> dict[str, Any]:
    """Read a camera file, with its list of frames.

    Args:
        path: The JSON file.
        one_camera: It may contain a single camera instead of frames.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it contains something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a transforms.json or poses.json")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); export it again") from None
    if one_camera and isinstance(document, dict) and "frames" not in document and {"fl_x", "fx"} & document.keys():
        if not {"cx", "cy"} <= document.keys():
            raise UserError(f"{path} contains one camera without cx and cy; give fl_x, fl_y, cx and cy in pixels")
        return document
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path} has no list of frames; expected transforms.json or poses.json")
    _check_names(frames, path)
    return document


def _check_names(frames: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse an image with two different cameras."""
    found: dict[str, Mapping[str, Any]] = {}
    for frame in frames:
        if (name := frame_name(frame)) and found.setdefault(name, frame) != frame:
            raise UserError(f"{path} has two different frames for {name}; remove one of them")


def frame_name(frame: Mapping[str, Any]) -> str:
    """The image name of a frame in a camera file."""
    return str(frame.get("file", frame.get("file_path", "")))


def read_matrix(values: Any, columns: int, name: str) -> Tensor:
    """A matrix from a camera file, float64.

    Raises:
        ValueError: If it is not a matrix.
    """
    try:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, columns)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the camera of {name} is not a matrix with {columns} columns ({one_line(error)})") from None


def matched(values: Mapping[str, Value], names: Sequence[str], source: object) -> list[Value | None]:
    """Match values of a file to images by name; leading folders and the suffix may be missing on either side.

    Args:
        values: By the names in the file.
        names: Names of the images.
        source: The file, for the error.

    Raises:
        ValueError: If it names none of them, or a name is ambiguous.
    """
    known = list(values)
    found = [None if entry is None else values[known[entry]] for entry in paired(known, names, source)]
    if all(value is None for value in found):
        named = ", ".join(known[:3]) or "no frame with one"
        raise UserError(f"{source} names none of the images (first {names[0]}); it has {named}: make the names match")
    return found
