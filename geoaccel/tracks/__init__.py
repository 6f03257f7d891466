"""Feature tracks measured in the photographs of a scene, and bundle adjustment on them.

``features`` detects features in one photograph; ``matching`` and ``patches``, or a network's tracker in ``follow``,
find them in another. ``find`` joins the matches to the ``Tracks`` of ``table``, ``triangulate`` computes their points,
and ``adjust`` fits cameras to them. Any other source of tracks creates a ``Tracks``, too.
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
