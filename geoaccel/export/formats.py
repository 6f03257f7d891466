"""Registry of output formats: a writer is a function with ``@FORMATS.register("name")`` in a file here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from geoaccel.errors import MissingPackage
from geoaccel.point_cloud import PointCloud
from geoaccel.registry import Registry
from geoaccel.scene import Scene

FORMATS: Registry[Callable[[Scene, PointCloud, Path], None]] = Registry("output format", package=__package__)
"""Names of formats to functions that write their files into a folder."""

IMAGE_FOLDER = "images"

WITH_IMAGES = {"colmap", "colmap-text", "nerfstudio"}
"""Formats that name images, which are then in ``images/``."""

NEEDS: dict[str, Callable[[], object]] = {}
"""By format, a function that imports its optional package; raises `MissingPackage`."""


WRITES: dict[str, tuple[str, ...]] = {}
"""Files and folders that a format writes, if declared."""


def why_not(name: str) -> str | None:
    """Why a format cannot be written here; None if it can."""
    try:
        NEEDS.get(name, lambda: None)()
    except MissingPackage as error:
        return str(error)
    return None
