"""Revisited places and cuts between unrelated clips, by features of the network's own encoder.

The descriptor of a frame is the mean of its patch features, minus the mean over all frames of the sequence: otherwise
the cosine of any two frames of one video is above 0.96 with the networks of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 0.75
"""Cosine from which two frames may show the same place."""
UNLIKE = 0.5
"""Cosine of a frame with the one before it below which there may be a cut between them."""
BLOCK = 1024
"""Frames compared with all others at a time: the full matrix of a long video would not fit into memory."""


@dataclass(frozen=True)
class Match:
    """Two similar frames.

    Attributes:
        first, second: Their indices, the earlier one first.
        cosine: Cosine of their features.
    """

    first: int
    second: int
    cosine: float


def centred(
    features: Tensor,  # [S, C]
) -> Tensor:  # [S, C], of length one
    """Features minus their mean over all frames."""
    features = features.double()
    return F.normalize(features - features.mean(dim=0), dim=1)


def matches(
    features: Tensor,  # [S, C], centred
    *,
    apart: int,
    near: int,
    most: int,
    least: float = ALIKE,
) -> list[Match]:
    """Pairs of frames that may show the same place, most similar first.

    Of pairs close to each other in both times only the best one is kept (non-maximum suppression).

    Args:
        features: From `centred`.
        apart: Least distance in time of a loop, in frames.
        near: Pairs whose frames are both nearer than this to those of a better pair are suppressed.
        most: Largest number of pairs.
        least: Smallest cosine of a pair.
    """
    found: list[Match] = []
    for start in range(apart, len(features), BLOCK):
        later = features[start : start + BLOCK]
        number = torch.arange(start, start + len(later))
        best, where = torch.full((len(later),), -1.0, dtype=features.dtype), torch.zeros(len(later), dtype=torch.long)
        for begin in range(0, start + len(later) - apart, BLOCK):
            earlier = features[begin : begin + BLOCK]
            too_soon = torch.arange(begin, begin + len(earlier)) > number[:, None] - apart
            cosine, row = (later @ earlier.T).masked_fill(too_soon, -1.0).max(dim=1)
            where = torch.where(cosine > best, begin + row, where)
            best = torch.maximum(best, cosine)
        for row_of in (best >= least).nonzero()[:, 0].tolist():
            found.append(Match(int(where[row_of]), start + row_of, float(best[row_of])))
    kept: list[Match] = []
    for one in sorted(found, key=lambda match: (-match.cosine, match.first, match.second)):
        near_it = (abs(one.first - other.first) < near and abs(one.second - other.second) < near for other in kept)
        if len(kept) < most and not any(near_it):
            kept.append(one)
    return kept


def suspects(
    features: Tensor,  # [S, C], centred
    below: float = UNLIKE,
) -> list[int]:
    """Frames that differ from the one before: a cut may precede them."""
    return (((features[1:] * features[:-1]).sum(dim=1) < below).nonzero()[:, 0] + 1).tolist()
