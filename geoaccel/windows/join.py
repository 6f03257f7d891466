"""From windows to one world: cuts, fits of neighbours, loops, and the pose graph over all of them.

A window with a cut in it counts as two parts, one before and one behind it, and only what shares frames, or a loop that
was checked, joins parts. What nothing joins is a piece of its own: it is reported, and not put into another's world.
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
"""Of the two halves of a loop's window, from which it is one. Chosen on validation scenes (docs/long-sequences.md)."""
ONE_SHOT = Agreement(depth=0.8, colour=0.4, seen=0.1)
"""Of the frames before and behind what may be a cut: below it is one."""
JOINED = 0.5
"""Share of the points that agree, below which windows that share frames are not joined."""
BOTH_SIDES = 3
"""Frames on each side of what may be a cut that are compared."""
LEAST_SIGMA = 0.005
HALF = 16
"""Frames about each end of a loop, at most: thresholds were chosen with so many, and more see less of one place."""
APART = 2
"""Windows between the frames of a loop, at least: over fewer joints there is little drift to take back."""

Read = Callable[[int], Window]
"""Gives a window by its number."""


@dataclass(frozen=True)
class Part:
    """A window, or what is left of it between cuts.

    Attributes:
        window: Its number.
        start, stop: Frames of the sequence.
    """

    window: int
    start: int
    stop: int

    def rows(self, window: Window, start: int, stop: int) -> slice:
        """Where some of its frames are in its window."""
        return slice(start - window.start, stop - window.start)

    def depth_of(self, frame: int) -> int:
        """How far a frame is from the nearer end; below 1 it is outside."""
        return min(frame - self.start + 1, self.stop - frame)


@dataclass(frozen=True)
class Loop:
    """Two frames that look alike, and what came of the check.

    Attributes:
        match: The frames.
        found: How the two halves of the window over both agree.
        closed: Whether the loop was closed.
    """

    match: Match
    found: Agreement
    closed: bool


@dataclass(frozen=True)
class Joined:
    """Where everything lies.

    Attributes:
        parts: All of them, in order.
        similarities: From the world of each part into that of its piece.
        pieces: Numbers of the parts that hang together, in order.
        edges: All that joins them.
        loops: All that were tried.
        cuts: Frames in front of which there is one.
        unclosed: Similarities without loops; the piece of each may be larger with them.
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
    """Frames in front of which there is a cut: the encoder finds them unlike, and the point maps do not agree.

    Args:
        spans: First frame of every window, and the one behind its last.
        features: Of all frames, centred; None where the network shows none, and no cut is found.
        read: Gives a window.
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
    """Windows, each divided at the cuts within it."""
    parts: list[Part] = []
    for number, (start, stop) in enumerate(spans):
        edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
        parts += [Part(number, *pair) for pair in pairwise(edges)]
    return parts


def neighbours(parts: Sequence[Part], read: Read, *, with_scale: bool) -> Iterator[tuple[int, Edge | None]]:
    """Fit every part to those of the window before that share frames with it.

    Yields:
        The number of a part, and its edge; None where its points do not agree with the other's.
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
    """Fit a window to another by frames that both have, given by their rows; the least sure pixels do not count."""
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
    """A loop that is to be tried.

    Attributes:
        match: The frames.
        parts: The part of each.
        halves: First and last + 1 frame about each.
    """

    match: Match
    parts: tuple[int, int]
    halves: tuple[tuple[int, int], tuple[int, int]]


def candidates(parts: Sequence[Part], features: Tensor | None, length: int) -> list[Candidate]:
    """Loops worth a forward, at most as many as there are parts."""
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
    """Check a loop by the window that was predicted over both of its halves.

    Args:
        one: The loop.
        over: Frames of the first half, then of the second.
        parts: All of them.
        read: Gives a window.
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
    """Solve for where all parts lie, and which of them hang together."""
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
    """Centred features of all frames, from those of every window and its first frame."""
    if any(one is None for _, one in parts) or not parts:
        return None
    found: Tensor | None = None
    for start, one in parts:
        assert one is not None
        found = torch.zeros(frames, one.shape[1]) if found is None else found
        found[start : start + len(one)] = one
    return None if found is None else centred(found)
