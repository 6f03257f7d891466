"""From windows to one world: cuts, fits of neighbours, loops, and the pose graph over all of them.

A window with a cut counts as two parts, one before and one after it. Only shared frames or a verified loop join parts.
Disconnected parts are separate pieces: they are reported, and not placed into one world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geoaccel.alignment import Similarity
from geoaccel.windows.agree import Agreement, agreement
from geoaccel.windows.fit import LEAST_SURE, Fit, fit_maps
from geoaccel.windows.graph import Edge, compose, inverse, pieces, solve
from geoaccel.windows.places import Match, centred, matches, suspects
from geoaccel.windows.store import Window

if TYPE_CHECKING:
    from geoaccel.windows.wide import Wide

SAME_PLACE = Agreement(depth=0.9, colour=0.7, seen=0.3)
"""Thresholds for the two halves of a loop's window to close the loop. Chosen on validation scenes
(docs/long-sequences.md)."""
ONE_SHOT = Agreement(depth=0.8, colour=0.4, seen=0.1)
"""Thresholds for the frames before and after a possible cut, below which it is one."""
JOINED = 0.5
"""Fraction of agreeing points below which windows that share frames are not joined."""
BOTH_SIDES = 3
"""Frames compared on each side of a possible cut."""
LEAST_SIGMA = 0.005
HALF = 16
"""Most frames around each end of a loop: thresholds were chosen with this many, and more cover less of one place."""
APART = 2
"""Least number of windows between the frames of a loop: over fewer joints there is little drift to correct."""

Read = Callable[[int], Window]
"""Returns a window by its number."""


@dataclass(frozen=True)
class Part:
    """A window, or its part between cuts.

    Attributes:
        window: Its number.
        start, stop: First and last + 1 frame of the sequence.
    """

    window: int
    start: int
    stop: int

    def rows(self, window: Window, start: int, stop: int) -> slice:
        """Rows of some of its frames in the window."""
        return slice(start - window.start, stop - window.start)

    def depth_of(self, frame: int) -> int:
        """Distance of a frame from the nearer end; below 1 it is outside."""
        return min(frame - self.start + 1, self.stop - frame)


@dataclass(frozen=True)
class Loop:
    """Two similar frames, and the result of the check.

    Attributes:
        match: The frames.
        found: Agreement of the two halves of the window over both.
        closed: Whether the loop was closed.
    """

    match: Match
    found: Agreement
    closed: bool


@dataclass(frozen=True)
class Joined:
    """Placement of everything.

    Attributes:
        parts: All parts, in order.
        similarities: From the world of each part to that of its piece.
        pieces: Indices of the connected parts, in order.
        edges: All edges.
        loops: All loops that were tried.
        cuts: Frames that a cut precedes.
        unclosed: Similarities without loop closure; with it, pieces may be larger.
        wide: All wide windows that were tried.
    """

    parts: list[Part]
    similarities: list[Similarity]
    pieces: list[list[int]]
    edges: list[Edge]
    loops: list[Loop]
    cuts: list[int]
    unclosed: list[Similarity]
    wide: Sequence[Wide] = ()


def owner(parts: Sequence[Part], frame: int) -> int:
    """The part in which a frame is farthest from the ends."""
    return max(range(len(parts)), key=lambda number: (parts[number].depth_of(frame), -number))


def find_cuts(spans: Sequence[tuple[int, int]], features: Tensor | None, read: Read) -> list[int]:
    """Frames that a cut precedes: encoder features differ, and the point maps do not agree.

    Args:
        spans: First and last + 1 frame of every window.
        features: Centred features of all frames; None if the network gives none: then no cut is found.
        read: Returns a window by its number.
    """
    found: list[int] = []
    for frame in [] if features is None else suspects(features):
        inside = [n for n, (start, stop) in enumerate(spans) if start < frame < stop]
        if not inside:  # windows without overlap
            continue
        window = read(max(inside, key=lambda n: (min(frame - spans[n][0], spans[n][1] - frame), -n)))
        row = frame - window.start
        before = [at for at in range(max(0, row - BOTH_SIDES), row) if not found or at + window.start >= found[-1]]
        behind = list(range(row, min(len(window), row + BOTH_SIDES)))
        if before and not agreement(window, before, behind).reaches(ONE_SHOT):
            found.append(frame)
    return found


def split(spans: Sequence[tuple[int, int]], cuts: Sequence[int]) -> list[Part]:
    """Windows, divided at cuts."""
    parts: list[Part] = []
    for number, (start, stop) in enumerate(spans):
        edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
        parts += [Part(number, *pair) for pair in pairwise(edges)]
    return parts


def neighbours(parts: Sequence[Part], read: Read, *, with_scale: bool) -> Iterator[tuple[int, Edge | None]]:
    """Fit every part to those of the previous window that share frames with it.

    Yields:
        The index of a part, and its edge; None if the points do not agree.
    """
    for b, part in enumerate(parts):
        for a in reversed(range(b)):
            other = parts[a]
            if other.window < part.window - 1:
                break
            start, stop = max(part.start, other.start), min(part.stop, other.stop)
            if other.window < part.window and start < stop:
                fit = _fit(part, read(part.window), other, read(other.window), start, stop, with_scale)
                joined = fit is not None and fit.agreement >= JOINED
                yield b, Edge(a, b, fit.similarity, max(fit.spread, LEAST_SIGMA)) if fit and joined else None


def _fit(
    moved: Part, source: Window, fixed: Part, target: Window, start: int, stop: int, with_scale: bool
) -> Fit | None:
    ours, theirs = moved.rows(source, start, stop), fixed.rows(target, start, stop)
    return fit_rows(source, ours, target, theirs, with_scale=with_scale)


def fit_rows(
    source: Window, ours: slice | list[int], target: Window, theirs: slice | list[int], *, with_scale: bool
) -> Fit | None:
    """Fit a window to another by shared frames, given by their rows; the least confident pixels do not count."""
    return fit_maps(
        source.points(ours),
        target.points(theirs),
        source.weights(ours, LEAST_SURE),
        target.weights(theirs, LEAST_SURE),
        target.depth[theirs],
        with_scale=with_scale,
    )


@dataclass(frozen=True)
class Candidate:
    """A loop candidate.

    Attributes:
        match: The frames.
        parts: The part of each.
        halves: First and last + 1 frame around each.
    """

    match: Match
    parts: tuple[int, int]
    halves: tuple[tuple[int, int], tuple[int, int]]


def candidates(parts: Sequence[Part], features: Tensor | None, length: int) -> list[Candidate]:
    """Loop candidates worth a forward, at most as many as there are parts."""
    found = []
    for match in [] if features is None else matches(features, apart=APART * length, near=length // 2, most=len(parts)):
        numbers, halves = [], []
        for frame in (match.first, match.second):
            number = owner(parts, frame)
            part, half = parts[number], min(length // 2, HALF)
            start = max(part.start, min(frame - half // 2, part.stop - half))
            numbers.append(number)
            halves.append((start, min(part.stop, start + half)))
        if numbers[0] != numbers[1]:
            found.append(Candidate(match, (numbers[0], numbers[1]), (halves[0], halves[1])))
    return found


def try_loop(
    one: Candidate, over: Window, parts: Sequence[Part], read: Read, *, with_scale: bool
) -> tuple[Loop, Edge | None]:
    """Verify a loop by the window predicted over both of its halves.

    Args:
        one: The candidate.
        over: Window over the frames of the first half, then of the second.
        parts: All parts.
        read: Returns a window by its number.
        with_scale: As for `fit_maps`.
    """
    count = one.halves[0][1] - one.halves[0][0]
    rows = (list(range(count)), list(range(count, len(over))))
    found = agreement(over, *rows)
    loop = Loop(one.match, found, closed=False)
    if not found.reaches(SAME_PLACE):
        return loop, None
    fits = []
    for number, (start, stop), own in zip(one.parts, one.halves, rows, strict=True):
        placed = replace(over, start=start - own[0])
        part = parts[number]
        fits.append(_fit(Part(-1, start, stop), placed, part, read(part.window), start, stop, with_scale))
    a, b = fits
    if a is None or b is None or min(a.agreement, b.agreement) < JOINED:
        return loop, None
    similarity = compose(a.similarity, inverse(b.similarity))
    edge = Edge(*one.parts, similarity, max(a.spread + b.spread, LEAST_SIGMA), loop=True)
    return replace(loop, closed=True), edge


def join(
    parts: list[Part],
    edges: list[Edge],
    loops: list[Loop],
    cuts: list[int],
    read: Read,
    *,
    with_scale: bool,
    wide: Sequence[Wide] = (),
) -> Joined:
    """Solve for the placement of all parts, and find the connected ones."""
    sizes = [read(part.window).size for part in parts] + [one.size for one in wide if one.used]
    count = len(parts)
    unclosed = [edge for edge in edges if not edge.loop]
    return Joined(
        parts=parts,
        similarities=solve(len(sizes), edges, sizes, with_scale=with_scale)[:count],
        pieces=pieces(count, [edge for edge in edges if not edge.wide]),
        edges=edges,
        loops=loops,
        cuts=cuts,
        unclosed=solve(len(sizes), unclosed, sizes, with_scale=with_scale)[:count],
        wide=wide,
    )


def features_of(parts: Sequence[tuple[int, Tensor | None]], frames: int) -> Tensor | None:
    """Centred features of all frames, from the features and first frame of every window."""
    if any(one is None for _, one in parts) or not parts:
        return None
    found: Tensor | None = None
    for start, one in parts:
        assert one is not None
        found = torch.zeros(frames, one.shape[1]) if found is None else found
        found[start : start + len(one)] = one
    return None if found is None else centred(found)
