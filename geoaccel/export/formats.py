"""Where output formats are registered: a writer is a function with ``@FORMATS.register("name")`` in a file here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from geoaccel.point_cloud import PointCloud
from geoaccel.registry import Registry
from geoaccel.scene import Scene

FORMATS: Registry[Callable[[Scene, PointCloud, Path], None]] = Registry("output format", package=__package__)
"""Names of formats to what writes them into a folder, as files that the format names."""
