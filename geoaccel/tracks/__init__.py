"""Where the photographs of a scene show the same points: measured tracks, and cameras adjusted to them.

``features`` finds places in one photograph, ``matching`` and ``patches`` find them in another, ``find`` joins what they
found to the ``Tracks`` of ``table``, ``triangulate`` gives their points, and ``adjust`` fits cameras to them. Whatever
else measures tracks makes a ``Tracks``.
"""

from geoaccel.tracks.features import pycolmap_here, require_pycolmap
from geoaccel.tracks.find import measure_tracks
from geoaccel.tracks.table import Tracks
from geoaccel.tracks.triangulate import Cameras, reprojection_errors, triangulate

__all__ = [
    "Cameras",
    "Tracks",
    "measure_tracks",
    "pycolmap_here",
    "reprojection_errors",
    "require_pycolmap",
    "triangulate",
]
