"""Files written from a scene: one module a format, each with `write(scene, cloud, folder)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from geoaccel.atomic import atomic_folder, check_output_folder
from geoaccel.claims import claimed
from geoaccel.errors import UserError
from geoaccel.export.formats import FORMATS
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "atomic_folder",
    "check_formats",
    "check_names",
    "check_output_folder",
    "claimed",
    "write",
]


DEFAULT_FORMATS = ("ply", "glb", "colmap")
_UTF8_NAMES = ("colmap", "colmap-text")


def check_formats(formats: Sequence[str]) -> None:
    """Refuse a name that is not in `FORMATS`."""
    if isinstance(formats, str):
        raise UserError(f"formats={formats!r} is one string; pass a list: [{formats!r}]")
    if not formats:
        raise UserError(f"no output format was given; known: {', '.join(sorted(FORMATS))}")
    for name in formats:
        FORMATS[name]


def check_names(names: Iterable[str], formats: Sequence[str]) -> None:
    """Refuse names of images that a format cannot hold: files may be named by any bytes, these are UTF-8."""
    strict = [name for name in formats if name in _UTF8_NAMES]
    for name in names if strict else ():
        try:
            name.encode()
        except UnicodeEncodeError:
            readable = os.fsencode(name).decode(errors="backslashreplace")
            raise UserError(
                f"the name of image {readable} is not UTF-8, which {strict[0]} needs; rename the file, or leave "
                f"out {', '.join(dict.fromkeys(strict))}"
            ) from None


def write(
    scene: Scene,
    cloud: PointCloud,
    folder: str | Path,
    formats: Sequence[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write every format into `folder`, which appears when all are complete."""
    check_formats(formats)
    check_names(scene.names, formats)
    with atomic_folder(folder, overwrite=overwrite, notes=scene.notes) as work:
        for name in dict.fromkeys(formats):
            FORMATS[name](scene, cloud, work)
