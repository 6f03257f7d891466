"""Tracks: surface points and their observations in the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class Tracks:
    """N tracks with M observations, sorted by track and then by frame; at most one observation per frame in a track.

    Attributes:
        track: Index of the track of each observation [M], int64, ascending; each of 0 to N - 1 has two or more.
        frame: Its image [M], int64.
        pixels: Where the point was measured, (u, v) in the original image [M, 2], float64, centres at half-integers.
        source: Name of what measured them.
    """

    track: np.ndarray
    frame: np.ndarray
    pixels: np.ndarray
    source: str

    def __len__(self) -> int:
        return int(self.track[-1]) + 1 if len(self.track) else 0

    def __repr__(self) -> str:
        return f"Tracks: {self}"

    def __str__(self) -> str:
        longer = 100 * float((self.lengths() >= 3).mean()) if len(self) else 0.0
        return f"{len(self):,} tracks by {self.source}, {longer:.0f} % of them in 3 images or more"

    def lengths(self) -> np.ndarray:  # [N]
        """Observations of each track."""
        return np.bincount(self.track, minlength=len(self))

    def of_each(self, frames: int) -> list[np.ndarray]:
        """Indices of the observations of each frame, ascending."""
        order = np.argsort(self.frame, kind="stable")
        return np.split(order, np.searchsorted(self.frame[order], np.arange(1, frames)))

    def keep(
        self,
        observations: np.ndarray,  # [M], bool
    ) -> tuple[Tracks, np.ndarray]:
        """The tracks that keep at least two of these observations, and their indices here [N']."""
        left = np.bincount(self.track, observations, minlength=len(self)) >= 2
        chosen = observations & left[self.track]
        kept = np.flatnonzero(left)
        number = np.cumsum(left) - 1
        return Tracks(number[self.track[chosen]], self.frame[chosen], self.pixels[chosen], self.source), kept

    def where(
        self,
        tracks: np.ndarray,  # [N], bool
    ) -> Tracks:
        """Some of the tracks."""
        return self.keep(tracks[self.track])[0]

    def of_frames(self, kept: Sequence[int]) -> Tracks:
        """The tracks in some of the frames, which are renumbered in this order."""
        frames = np.asarray(kept, np.int64)
        number = np.full(max(self.frame.max(initial=-1), frames.max(initial=-1)) + 1, -1)
        number[frames] = np.arange(len(frames))
        left, _ = self.keep(number[self.frame] >= 0)
        frame = number[left.frame]
        order = np.lexsort((frame, left.track))
        return Tracks(left.track, frame[order], left.pixels[order], left.source)


def join(
    matches: Iterable[tuple[int, int]],  # nodes, the most confident first
    frame: np.ndarray,  # [K], of each node
    pixels: np.ndarray,  # [K, 2]
    source: str,
) -> Tracks:
    """Join matched nodes to tracks. A match that would put two nodes of one image into a track is left out."""
    parent: dict[int, int] = {}
    members: dict[int, dict[int, int]] = {}

    def root(node: int) -> int:
        while (above := parent.get(node, node)) != node:
            parent[node] = parent.get(above, above)
            node = above
        return node

    for a, b in matches:
        first, second = root(a), root(b)
        if first == second:
            continue
        mine = members.setdefault(first, {int(frame[first]): first})
        theirs = members.setdefault(second, {int(frame[second]): second})
        if mine.keys() & theirs.keys():
            continue
        if len(mine) < len(theirs):
            first, second, mine, theirs = second, first, theirs, mine
        parent[second] = first
        mine.update(theirs)
        del members[second]
    joined = [sorted(member.values(), key=lambda node: frame[node]) for member in members.values() if len(member) > 1]
    nodes = np.array([node for member in joined for node in member], np.int64)
    track = np.repeat(np.arange(len(joined)), [len(member) for member in joined])
    return Tracks(track, frame[nodes].astype(np.int64), pixels[nodes].astype(np.float64), source)
