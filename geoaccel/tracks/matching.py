"""Feature matches between two images: verified by epipolar geometry, or guided by the predicted geometry.

First every pair is matched without guidance. These matches measure the error of the predicted geometry, which gives the
radius for a guided search around each predicted position. That finds more matches, as fewer features can be confused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoaccel.scene import Scene
from geoaccel.tracks.features import Features, quiet
from geoaccel.tracks.predicted import lift, see

# Unguided matches have many candidates; guided ones have few, and may have lower similarity and a weaker ratio test.
FREE_RATIO, GUIDED_RATIO = 0.8, 0.9
FREE_LIKENESS, GUIDED_LIKENESS = 0.8, 0.75
EPIPOLAR_PIXELS = 3.0  # of the image that features were detected in
LEAST_INLIERS = 15
NEAR, FAR = 0.015, 0.08  # fractions of the diagonal


@dataclass(frozen=True, eq=False)
class Matches:
    """Matched features of images i and j.

    Attributes:
        pair: (i, j).
        index: Features [K, 2].
        likeness: Dot products of descriptors [K].
    """

    pair: tuple[int, int]
    index: np.ndarray
    likeness: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Agreement of the predicted geometry with unguided matches.

    Attributes:
        matches: Number of matches compared.
        offset: Median distance of a feature from its predicted position, as a fraction of the diagonal.
    """

    matches: int
    offset: float

    @property
    def holds(self) -> bool:
        """Whether the prediction is accurate enough for guided matching."""
        return self.offset < FAR / 2

    @property
    def radius(self) -> float:
        """Search radius around a predicted position, as a fraction of the diagonal."""
        return float(np.clip(3 * self.offset, NEAR, FAR))


def free_matches(features: Sequence[Features], pairs: Iterable[tuple[int, int]]) -> list[Matches]:
    """Mutual best matches that pass the ratio test and obey one epipolar geometry."""
    found = []
    with quiet():
        for i, j in pairs:
            likeness = torch.from_numpy(features[i].descriptors) @ torch.from_numpy(features[j].descriptors).T
            free = _mutual((i, j), likeness, FREE_RATIO, FREE_LIKENESS)
            matches, matrix = _epipolar(features, free)
            if matrix is not None:  # that geometry guides a second search
                near = torch.from_numpy(_near_lines(features, i, j, matrix))
                second = _mutual((i, j), likeness.masked_fill(~near, -1.0), GUIDED_RATIO, GUIDED_LIKENESS)
                more, _ = _epipolar(features, second)
                matches = max(matches, more, key=lambda kind: len(kind.index))
            found.append(matches)
    return found


def agreement(scene: Scene, features: Sequence[Features], free: Iterable[Matches]) -> Agreement:
    """Compare unguided matches with their predicted positions."""
    offsets = [np.zeros(0)]
    for matches in free:
        i, j = matches.pair
        predicted = see(scene, j, lift(scene, i, features[i].pixels[matches.index[:, 0]])).pixels
        off = np.linalg.norm(predicted - features[j].pixels[matches.index[:, 1]], axis=1) / diagonal(scene, j)
        offsets.append(off[np.isfinite(off)])
    every = np.concatenate(offsets)
    # Too few matches do not contradict a prediction: unguided matching finds none between distant views.
    return Agreement(len(every), float(np.median(every)) if len(every) >= LEAST_INLIERS else FAR / 4)


def guided_matches(
    scene: Scene, features: Sequence[Features], free: Iterable[Matches], radius: float
) -> Iterator[Matches]:
    """Mutual best matches among features within `radius` (a fraction of the diagonal) of their predicted positions."""
    with quiet():
        for matches in free:
            i, j = matches.pair
            near = _near(scene, features, i, j, radius) & _near(scene, features, j, i, radius).T
            guided = matches
            if near.any():
                likeness = torch.from_numpy(features[i].descriptors) @ torch.from_numpy(features[j].descriptors).T
                guided = _mutual((i, j), likeness.masked_fill_(~near, -1.0), GUIDED_RATIO, GUIDED_LIKENESS)
                guided, _ = _epipolar(features, guided)
            yield max(guided, matches, key=lambda kind: len(kind.index))


def diagonal(scene: Scene, i: int) -> float:
    """Diagonal of an original image, in pixels."""
    return float(np.hypot(*scene.transforms[i].original_size))


def _near(scene: Scene, features: Sequence[Features], i: int, j: int, radius: float) -> Tensor:  # [Ki, Kj] bool
    seen = see(scene, j, lift(scene, i, features[i].pixels))
    at = torch.from_numpy(np.where(seen.likely[:, None], seen.pixels, np.inf)).float()
    return torch.cdist(at, torch.from_numpy(features[j].pixels).float()) < radius * diagonal(scene, j)


def _near_lines(features: Sequence[Features], i: int, j: int, matrix: np.ndarray) -> np.ndarray:  # [Ki, Kj] bool
    """Which features lie on each other's epipolar lines."""
    first, second = (np.c_[features[k].pixels, np.ones(len(features[k].pixels))].astype(np.float32) for k in (i, j))
    matrix = matrix.astype(np.float32)
    product = np.abs(first @ matrix.T @ second.T)
    slope = [np.linalg.norm(lines[:, :2], axis=1).clip(1e-12) for lines in (first @ matrix.T, second @ matrix)]
    limit = EPIPOLAR_PIXELS * max(features[i].scale, features[j].scale)
    return product < limit * np.minimum(slope[0][:, None], slope[1][None])


def _mutual(pair: tuple[int, int], likeness: Tensor, ratio: float, least: float) -> Matches:
    """Mutual best matches that pass the ratio test in both directions."""
    if min(likeness.shape) < 2:
        return Matches(pair, np.zeros((0, 2), np.int64), np.zeros(0))
    best, at = likeness.topk(2, dim=1)
    back, home = likeness.topk(2, dim=0)
    row, column = torch.arange(len(likeness)), at[:, 0]
    clear = _clear(best[:, 0], best[:, 1], ratio) & _clear(back[0], back[1], ratio)[column]
    kept = ((home[0][column] == row) & clear & (best[:, 0] > least)).nonzero()[:, 0]
    return Matches(pair, torch.stack([row[kept], column[kept]], dim=1).numpy(), best[kept, 0].double().numpy())


def _clear(best: Tensor, next_best: Tensor, ratio: float) -> Tensor:
    return (1 - best).clamp(min=0) < ratio**2 * (1 - next_best)


def _epipolar(features: Sequence[Features], matches: Matches) -> tuple[Matches, np.ndarray | None]:
    """Matches that obey one epipolar geometry, and its fundamental matrix; none if too few do."""
    i, j = matches.pair
    scale = max(features[i].scale, features[j].scale)
    first, second = (features[k].pixels[matches.index[:, side]] for side, k in enumerate((i, j)))
    good, matrix = epipolar_inliers(first, second, EPIPOLAR_PIXELS * scale, LEAST_INLIERS)
    return Matches(matches.pair, matches.index[good], matches.likeness[good]), matrix


def epipolar_inliers(
    first: np.ndarray,  # [K, 2]
    second: np.ndarray,  # [K, 2]
    pixels: float,
    least: int,
) -> tuple[np.ndarray, np.ndarray | None]:  # [K] bool, [3, 3]
    """Inliers of one epipolar geometry, and its fundamental matrix; none if fewer than `least`."""
    import pycolmap

    nothing = np.zeros(len(first), bool), None
    if len(first) < max(least, 8):
        return nothing
    options = pycolmap.RANSACOptions()
    options.max_error, options.random_seed, options.max_num_trials = pixels, 0, 10_000
    found = pycolmap.estimate_fundamental_matrix(first, second, options)
    if found is None or found["num_inliers"] < least:
        return nothing
    return np.asarray(found["inlier_mask"], bool), np.asarray(found["F"])
