"""Where the photographs of a scene show the same points: measured tracks, and cameras adjusted to them.

``features`` finds places in one photograph; ``matching`` and ``patches``, or a network's tracker in ``follow``, find
them in another. ``find`` joins what they found to the ``Tracks`` of ``table``, ``triangulate`` gives their points, and
``adjust`` fits cameras to them. Whatever else measures tracks makes a ``Tracks``.
"""

from geoaccel.tracks.find import LEAST_TRACKS, measure_tracks, without_short
from geoaccel.tracks.table import Tracks
from geoaccel.tracks.triangulate import Cameras, reprojection_errors, triangulate

__all__ = [
    "LEAST_TRACKS",
    "Cameras",
    "Tracks",
    "measure_tracks",
    "reprojection_errors",
    "triangulate",
    "without_short",
]
