"""From photographs and predicted geometry to tracks: matches of all pairs, joined."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import numpy as np

from geoaccel.scene import Scene
from geoaccel.tracks.features import Features, find_features
from geoaccel.tracks.follow import Follow, followed
from geoaccel.tracks.matching import Agreement, Matches, agreement, diagonal, free_matches, guided_matches
from geoaccel.tracks.pairs import choose_pairs
from geoaccel.tracks.patches import shifted
from geoaccel.tracks.selected import selected_features, selected_tracks
from geoaccel.tracks.table import Tracks, join
from geoaccel.tracks.triangulate import Cameras, reprojection_errors, triangulate

logger = logging.getLogger(__name__)

SNAP = 0.75  # pixels of the image that features were detected in
ENOUGH = 50  # observations of longer tracks from which an image needs no two-view tracks
LEAST_TRACKS = 10  # for a model
PATCHES_AFTER = 0.2  # subtracted from correlations, which then rank below descriptor products when matches are joined


def measure_tracks(scene: Scene, features: Sequence[Features] | None = None, follow: Follow | None = None) -> Tracks:
    """Measure feature tracks in the photographs of a scene, within its masks.

    Args:
        scene: Its cameras and depth guide the search, as far as the photographs agree with them.
        features: From `find_features`, if they exist already.
        follow: Tracks features through the images instead of matching them; unguided matches still decide whether the
            prediction can be trusted, and tracks are verified in the same way.

    Raises:
        UserError: pycolmap is not installed.
    """
    features = selected_features(scene, find_features(scene) if features is None else features)
    free = free_matches(features, choose_pairs(scene))
    agrees = agreement(scene, features, free)
    nodes = Nodes(features)
    if follow is None:
        _add_matched(nodes, scene, features, free, agrees)
    else:
        for i, j, own, pixels, sure in followed(scene, features, follow):
            places = np.array([nodes.place(j, pixel) for pixel in pixels], np.int64)
            nodes.add(sure, nodes.of_feature[i][own], places)
    if not agrees.holds:
        off = 100 * agrees.offset
        logger.warning(
            "the photographs disagree with the predicted cameras and depth, by %.0f %% of the image in the median of "
            "%d matches: cameras and depth may be wrong; tracks of the COLMAP model come from the photographs alone",
            off,
            agrees.matches,
        )
    # Patches and trackers find places that are no features.
    tracks = selected_tracks(scene, nodes.tracks("SIFT" if follow is None else "the track head"))
    if agrees.holds and len(tracks):
        tracks = _verified(scene, tracks, agrees.radius)
    return tracks


def _add_matched(
    nodes: Nodes, scene: Scene, features: Sequence[Features], free: Sequence[Matches], agrees: Agreement
) -> None:
    """Feature matches and, if the prediction can be trusted, patch matches."""
    for match in guided_matches(scene, features, free, agrees.radius) if agrees.holds else free:
        i, j = match.pair
        nodes.add(match.likeness, nodes.of_feature[i][match.index[:, 0]], nodes.of_feature[j][match.index[:, 1]])
    if not agrees.holds:
        return
    for i, j in itertools.chain.from_iterable(((i, j), (j, i)) for i, j in (match.pair for match in free)):
        found = shifted(scene, features, i, j, agrees.radius * diagonal(scene, j))
        places = np.array([nodes.place(j, pixel) for pixel in found.pixels], np.int64)
        nodes.add(found.likeness - PATCHES_AFTER, nodes.of_feature[i][found.anchor], places)


def without_short(tracks: Tracks, frames: int) -> Tracks:
    """Leave out two-view tracks if both images have enough longer ones: no third view confirms them."""
    long = tracks.lengths() >= 3
    rich = np.bincount(tracks.frame[long[tracks.track]], minlength=frames) >= ENOUGH
    poor = np.bincount(tracks.track, ~rich[tracks.frame], minlength=len(tracks)) > 0
    return tracks.where(long | poor)


def _verified(scene: Scene, tracks: Tracks, radius: float) -> Tracks:
    """Leave out observations farther from the projection of their point than the error of the prediction allows."""
    cameras = Cameras.of(scene)
    error = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    limit = np.array([radius * diagonal(scene, i) for i in range(len(scene))])
    return tracks.keep(error < limit[tracks.frame])[0]


class Nodes:
    """Image positions that may belong to tracks: features and matched patches.

    Attributes:
        of_feature: For each image, the nodes of its features.
    """

    def __init__(self, features: Sequence[Features]) -> None:
        self._scales = [found.scale for found in features]
        self._frame: list[int] = []
        self._pixels: list[tuple[float, float]] = []
        self._matches: list[tuple[float, int, int]] = []
        self._cells: list[dict[tuple[int, int], list[int]]] = [{} for _ in features]
        self.of_feature = [
            np.array([self.place(i, pixel) for pixel in found.pixels], np.int64) for i, found in enumerate(features)
        ]

    def place(self, i: int, pixel: np.ndarray) -> int:
        """The node of image i at a pixel; a new one if there is none nearby."""
        near, (u, v) = SNAP * self._scales[i], pixel.tolist()
        x, y = int(u // near), int(v // near)
        cells = self._cells[i]
        best, nearest = -1, near
        for cell in itertools.product((x - 1, x, x + 1), (y - 1, y, y + 1)):
            for node in cells.get(cell, ()):
                distance = float(np.hypot(self._pixels[node][0] - u, self._pixels[node][1] - v))
                if distance < nearest:
                    best, nearest = node, distance
        if best < 0:
            best = len(self._pixels)
            self._frame.append(i)
            self._pixels.append((u, v))
            cells.setdefault((x, y), []).append(best)
        return best

    def add(self, likeness: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        """Add matches between nodes."""
        self._matches += zip(likeness.tolist(), first.tolist(), second.tolist(), strict=True)

    def tracks(self, source: str) -> Tracks:
        """Join matches to tracks, the most confident first."""
        pairs = [(a, b) for _, a, b in sorted(self._matches, reverse=True)]
        return join(pairs, np.array(self._frame, np.int64), np.array(self._pixels).reshape(-1, 2), source)
