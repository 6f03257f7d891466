"""Wide windows over every fourth frame, every sixteenth, and so on, against the drift of short windows.

Each joint of two windows adds an error, and a window of N frames of a video constrains rotation weakly. A wide window
is one more forward over every fourth frame: it spans four times as long, from viewpoints further apart. It shares
frames with the windows below it and is aligned to them as neighbours are; it is one more node of the pose graph, but no
frame of the result is taken from it. The next level has every fourth frame of this one, until one window spans all.

Networks guess the relative pose of frames without common view. So a wide window is used only if its points agree with
those of nearly all windows below it, and its edges are down-weighted if the rest of the graph contradicts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from geoaccel.windows.fit import Fit
from geoaccel.windows.graph import Edge, pieces
from geoaccel.windows.join import LEAST_SIGMA, Part, Read, fit_rows
from geoaccel.windows.store import Window

FACTOR = 4
"""Frames of a level per frame of the level above. Chosen on validation scenes, like the next two."""
AGREES = 0.9
"""Fraction of agreeing points from which a window below counts as agreeing."""
NEARLY_ALL = 0.9
"""Fraction of the windows below that have to agree."""
FEWEST = 2
"""Least number of shared frames for a fit."""


@dataclass(frozen=True)
class Wide:
    """One wide window.

    Attributes:
        frames: Frames of the sequence, with a step of 4, 16, ...
        agreement: Fraction of agreeing points with each window below that shares frames with it; 0 if that one is not
            used itself.
        used: Whether its edges are in the graph.
        size: Size of its scene, in its own unit.
    """

    frames: range
    agreement: tuple[float, ...]
    used: bool
    size: float


@dataclass(frozen=True)
class _Below:
    """A window of the level below.

    Attributes:
        number: Index in the graph; -1 if it is not used.
        frames: Its frames.
        read: Returns it.
    """

    number: int
    frames: range
    read: Callable[[], Window]


def levels(start: int, stop: int, length: int) -> list[list[range]]:
    """Frames of all wide windows over a run of frames, level by level.

    Args:
        start, stop: First and last + 1 frame of the run.
        length: Frames of a window.

    Returns:
        Windows of `length` frames that overlap by half, fewer if the run is short; no level if the one below already
        spans the run, or if it would have less than half a window.
    """
    found: list[list[range]] = []
    step = FACTOR
    if length < FEWEST * FACTOR:  # a wide window would share too few frames with those below
        return found
    while length * step < FACTOR * (stop - start):
        picked = range(start, stop, step)
        if len(picked) < length // 2:
            break
        last = max(0, len(picked) - length)
        found.append([picked[at : at + length] for at in sorted({*range(0, last, length // 2), last})])
        step *= FACTOR
    return found


def runs(parts: Sequence[Part], edges: Sequence[Edge]) -> list[list[int]]:
    """Runs of consecutive joined parts, by index."""
    return pieces(len(parts), [edge for edge in edges if not edge.loop])


def count_wide(parts: Sequence[Part], edges: Sequence[Edge], length: int) -> int:
    """Number of wide windows over all levels."""
    return sum(len(level) for run in runs(parts, edges) for level in _levels(run, parts, length))


def _levels(run: Sequence[int], parts: Sequence[Part], length: int) -> list[list[range]]:
    return levels(parts[run[0]].start, max(parts[number].stop for number in run), length)


def widen(
    parts: Sequence[Part],
    edges: Sequence[Edge],  # between neighbours
    length: int,
    read: Read,
    predict: Callable[[Sequence[range]], Iterator[Window]],
    *,
    with_scale: bool,
    on_window: Callable[[], object] = lambda: None,
) -> tuple[list[Wide], list[Edge]]:
    """Predict and fit all wide windows.

    Args:
        parts: Nodes 0 and up of the graph; used wide windows follow them, in order.
        edges: Edges between parts.
        length: Frames of a window.
        read: Returns a window by its number.
        predict: Yields the windows over the frames of a level; can be called again once they are stored.
        with_scale: As for `fit_maps`.
        on_window: Called after each.

    Returns:
        All that were tried, and the edges of those used.
    """
    tried: list[Wide] = []
    found: list[Edge] = []
    for run in runs(parts, edges):
        below = [_below(number, parts[number], read) for number in run]
        for level in _levels(run, parts, length):
            above: list[_Below] = []
            for frames, window in zip(level, predict(level), strict=True):
                number = len(parts) + sum(wide.used for wide in tried)
                wide, own = _fitted(number, frames, below, window, with_scale)
                above.append(_Below(number if wide.used else -1, frames, partial(_again, predict, frames)))
                tried.append(wide)
                found += own
                on_window()
            if all(one.number < 0 for one in above):
                break
            below = above
    return tried, found


def _again(predict: Callable[[Sequence[range]], Iterator[Window]], frames: range) -> Window:
    return next(predict([frames]))


def _below(number: int, part: Part, read: Read) -> _Below:
    return _Below(number, range(part.start, part.stop), lambda: read(part.window))


def _fitted(
    number: int, frames: range, below: Sequence[_Below], window: Window, with_scale: bool
) -> tuple[Wide, list[Edge]]:
    """Fit a wide window to all windows below that share frames with it."""
    agreement, edges = [], []
    for one in below:
        shared = [frame for frame in frames if frame in one.frames]
        if len(shared) < FEWEST:
            continue
        fit = None if one.number < 0 else _fit(window, frames, one, shared, with_scale)
        agreement.append(0.0 if fit is None else fit.agreement)
        if fit is not None and fit.agreement >= AGREES:
            edges.append(Edge(one.number, number, fit.similarity, max(fit.spread, LEAST_SIGMA), wide=True))
    used = bool(edges) and len(edges) >= NEARLY_ALL * len(agreement)
    return Wide(frames, tuple(agreement), used, window.size), edges if used else []


def _fit(window: Window, frames: range, one: _Below, shared: Sequence[int], with_scale: bool) -> Fit | None:
    target = one.read()
    ours = [frames.index(frame) for frame in shared]
    theirs = [(frame - target.start) // one.frames.step for frame in shared]
    return fit_rows(window, ours, target, theirs, with_scale=with_scale)
