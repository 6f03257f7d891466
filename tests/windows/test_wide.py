"""Wide windows: they take back what joints add up to, and are not used where the windows below say otherwise."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracle import exact_window, short_loop, windows_of

from geoaccel.alignment import Similarity
from geoaccel.eval.metrics.trajectories import absolute_trajectory_error
from geoaccel.windows.assemble import place_frames
from geoaccel.windows.graph import Edge, compose, exponential, solve
from geoaccel.windows.join import Part, join, neighbours, split
from geoaccel.windows.store import Window
from geoaccel.windows.wide import FACTOR, Wide, levels, runs, widen

FRAMES, LENGTH = 128, 16
SPANS = [(start, start + LENGTH) for start in range(0, FRAMES - 8, 8)]
PARTS = split(SPANS, [])


@functools.cache
def exact() -> list[Window]:
    return windows_of(short_loop(FRAMES), SPANS)


@functools.cache
def exact_wide(frames: range) -> Window:
    batch = short_loop(FRAMES).render(frames[0], frames[-1] + 1)
    picked = {
        name: value[:, :: frames.step]
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
        and value.ndim > 1
        and value.shape[1] == len(range(frames[0], frames[-1] + 1))
    }
    return replace(exact_window(replace(batch, **picked), 0, 1000 + frames.start), start=frames.start)


def widened(windows: list[Window], predict=exact_wide) -> tuple[list[Wide], list[Edge], list[Edge]]:
    read = windows.__getitem__
    edges = [edge for _, edge in neighbours(PARTS, read, with_scale=True) if edge is not None]
    return *widen(PARTS, edges, LENGTH, read, functools.partial(map, predict), with_scale=True), edges


def test_every_level_spans_the_run_and_the_last_one_alone() -> None:
    found = levels(0, 600, 32)
    assert [len(level) for level in found] == [9, 2]
    for number, level in enumerate(found):
        assert all(len(frames) == 32 and frames.step == FACTOR ** (number + 1) for frames in level)
        assert level[0][0] == 0
        assert 600 - level[0].step <= level[-1][-1] < 600
        for one, other in pairwise(level):
            assert len(set(one) & set(other)) >= 16
    assert levels(100, 132, 32) == []  # one window spans it
    assert levels(100, 164, 32) == [[range(100, 164, 4)]]
    assert levels(100, 148, 32) == []  # twelve frames are less than half a window
    assert levels(0, 600, 7) == []  # windows that short would share one frame


def drifting(windows: list[Window], turn: float) -> list[Window]:
    """Each window bends the path: from frame to frame its cameras turn too far, and points go with them."""
    found = []
    for window in windows:
        along = torch.arange(len(window), dtype=torch.float64)
        steps = torch.zeros(len(window), 7, dtype=torch.float64)
        steps[:, 1] = turn * along
        bent = exponential(steps)
        poses = [
            Similarity(torch.ones(()).double(), bent.rotation[row], torch.zeros(3).double()).apply_poses(
                window.cam_from_world[row : row + 1].double()
            )
            for row in range(len(window))
        ]
        found.append(replace(window, cam_from_world=torch.cat(poses).float()))
    return found


def test_wide_windows_take_back_drift() -> None:
    windows = drifting(exact(), 0.004)
    wide, more, edges = widened(windows)
    assert [one.frames.step for one in wide] == [4] * 3 + [16]
    assert all(one.used for one in wide)
    truth = short_loop(FRAMES).cameras.cam_from_world[0]
    errors = []
    for given in ((edges, []), (edges + more, wide)):
        joined = join(PARTS, given[0], [], [], windows.__getitem__, with_scale=True, wide=given[1])
        (piece,) = place_frames(joined, FRAMES, windows.__getitem__)
        errors.append(absolute_trajectory_error(piece.cam_from_world.float(), truth)["ate_rmse"])
    assert errors[1] < 0.6 * errors[0]


def test_exact_wide_windows_change_nothing() -> None:
    wide, more, edges = widened(exact())
    joined = join(PARTS, edges + more, [], [], exact().__getitem__, with_scale=True, wide=wide)
    assert len(joined.similarities) == len(PARTS)
    assert {edge.b - len(PARTS) for edge in more} == set(range(len(wide)))
    (piece,) = place_frames(joined, FRAMES, exact().__getitem__)
    truth = short_loop(FRAMES).cameras.cam_from_world[0]
    assert absolute_trajectory_error(piece.cam_from_world.float(), truth)["ate_rmse"] < 1e-3


def test_a_wide_window_that_is_guessed_is_not_used_and_no_level_stands_on_it() -> None:
    def guessed(frames: range) -> Window:
        window = exact_wide(frames)
        wrong = 1 + torch.rand(window.depth.shape, generator=torch.Generator().manual_seed(frames.start))
        return replace(window, depth=window.depth * wrong)

    wide, more, _ = widened(exact(), guessed)
    assert [one.frames.step for one in wide] == [4] * 3  # nothing to stand on for the next level
    assert not any(one.used for one in wide)
    assert more == []


def test_one_bad_window_below_keeps_those_over_it_out() -> None:
    windows = exact()
    wrong = 1 + torch.rand(windows[0].depth.shape, generator=torch.Generator().manual_seed(0))
    wrong = 1 + 0.3 * (wrong - 1)
    spoiled = [replace(windows[0], depth=windows[0].depth * wrong), *windows[1:]]
    wide, more, edges = widened(spoiled)
    assert len(edges) == len(PARTS) - 1  # a joint asks for less
    assert [one.used for one in wide[:3]] == [False, True, True]
    assert wide[0].agreement[0] < 0.9 < min(wide[0].agreement[1:])
    assert all(edge.a != 0 for edge in more)
    assert wide[3].agreement[0] == 0  # of a level on it, it is none to agree with
    assert not wide[3].used


def test_wide_windows_stay_within_a_run() -> None:
    parts = [Part(0, 0, 32), Part(1, 16, 48), Part(2, 48, 80), Part(3, 64, 96)]
    edges = [Edge(0, 1, one()), Edge(2, 3, one()), Edge(1, 3, one(), loop=True)]
    assert runs(parts, edges) == [[0, 1], [2, 3]]


def one() -> Similarity:
    moved = exponential(torch.zeros(1, 7, dtype=torch.float64))
    return Similarity(moved.scale[0], moved.rotation[0], moved.translation[0])


@pytest.mark.parametrize("kind", ["loop", "wide"])
def test_a_doubtful_edge_counts_less(kind: str) -> None:
    step = one()
    step = Similarity(step.scale, step.rotation, torch.tensor([1.0, 0, 0]).double())
    chain = [Edge(n, n + 1, step, 0.01) for n in range(4)]
    wrong = Similarity(step.scale, step.rotation, torch.tensor([0, 3.0, 0]).double())
    sure = solve(5, [*chain, Edge(0, 4, wrong, 0.01)], [1.0] * 5)
    doubted = solve(5, [*chain, Edge(0, 4, wrong, 0.01, **{kind: True})], [1.0] * 5)
    right = compose(compose(step, step), compose(step, step)).translation
    assert float((doubted[4].translation - right).norm()) < 0.1 < float((sure[4].translation - right).norm())
