"""Windows in one world: exact ones meet exactly; a false loop is rejected, a cut parts what is behind it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import exact_window, short_loop, windows_of

from geoaccel.alignment import umeyama
from geoaccel.cameras import invert_rigid
from geoaccel.eval.data.synthetic import SceneBatch
from geoaccel.windows.agree import agreement
from geoaccel.windows.assemble import place_frames
from geoaccel.windows.graph import identity
from geoaccel.windows.join import (
    SAME_PLACE,
    Candidate,
    Edge,
    Joined,
    Part,
    candidates,
    features_of,
    find_cuts,
    join,
    neighbours,
    split,
    try_loop,
)
from geoaccel.windows.places import Match, centred
from geoaccel.windows.store import Window

FRAMES = 160
SPANS = [(start, start + 32) for start in range(0, 129, 16)]


@functools.cache
def exact() -> list[Window]:
    return windows_of(short_loop(FRAMES), SPANS)


def of_frames(batches: list[SceneBatch]) -> Any:
    """Frames of several clips as one batch."""
    names = ("images", "depth", "mask", "points_world", "intrinsics", "cam_from_world")
    parts = {name: torch.cat([getattr(batch, name) for batch in batches], dim=1) for name in names}
    return replace(batches[0], **parts)


def edges_of(parts: list[Part], windows: list[Window]) -> list[Edge]:
    return [edge for _, edge in neighbours(parts, windows.__getitem__, with_scale=True) if edge is not None]


def furthest(poses: torch.Tensor, truth: torch.Tensor) -> float:
    """Distance of a camera centre from the true one, after a similarity."""
    source, target = (invert_rigid(p.double())[:, :3, 3] for p in (poses, truth))
    return float((umeyama(source, target).apply_points(source) - target).norm(dim=-1).max())


def test_exact_windows_meet_exactly() -> None:
    windows = exact()
    parts = split(SPANS, [])
    edges = edges_of(parts, windows)
    assert [(edge.a, edge.b) for edge in edges] == [(n, n + 1) for n in range(8)]
    joined = join(parts, edges, [], [], windows.__getitem__, with_scale=True)
    (piece,) = place_frames(joined, FRAMES, windows.__getitem__)
    assert piece.frames == list(range(FRAMES))
    assert furthest(piece.cam_from_world, short_loop(FRAMES).cameras.cam_from_world[0]) < 1e-3


def test_a_frame_is_taken_from_where_it_is_far_from_the_ends() -> None:
    windows = exact()
    parts = split(SPANS, [])
    joined = join(parts, edges_of(parts, windows), [], [], windows.__getitem__, with_scale=True)
    (piece,) = place_frames(joined, FRAMES, windows.__getitem__)
    assert piece.part[:24] == [0] * 24
    assert piece.part[24:40] == [1] * 16
    assert piece.part[-24:] == [8] * 24


def over(first: int, second: int, other: Any = None) -> Window:
    """A window over eight frames at two times."""
    video = short_loop(FRAMES)
    halves = [video.render(first, first + 8), (other or video).render(second, second + 8)]
    return exact_window(of_frames(halves), 0, 99)


def tried(first: int, second: int, window: Window, windows: list[Window] | None = None) -> Any:
    windows = windows or exact()
    parts = split(SPANS, [])
    numbers = [max(range(9), key=lambda n: parts[n].depth_of(frame + 4)) for frame in (first, second)]
    one = Candidate(
        Match(first + 4, second + 4, 0.9),
        (numbers[0], numbers[1]),
        ((first, first + 8), (second, second + 8)),
    )
    return try_loop(one, window, parts, windows.__getitem__, with_scale=True)


def test_a_true_loop_is_closed() -> None:
    loop, edge = tried(0, 152, over(0, 152))
    assert loop.closed
    assert edge is not None
    parts = split(SPANS, [])
    windows = exact()
    joined = join(parts, [*edges_of(parts, windows), edge], [loop], [], windows.__getitem__, with_scale=True)
    (piece,) = place_frames(joined, FRAMES, windows.__getitem__)
    assert furthest(piece.cam_from_world, short_loop(FRAMES).cameras.cam_from_world[0]) < 1e-3


def spoiled(window: Window) -> Window:
    """Its depth is another one at every pixel."""
    wrong = 1 + 2 * torch.rand(window.depth.shape, generator=torch.Generator().manual_seed(0))
    return replace(window, depth=window.depth * wrong)


def test_windows_that_do_not_agree_are_not_joined() -> None:
    """Though they share frames: a piece ends there."""
    windows = exact()
    windows = [*windows[:4], spoiled(windows[4]), *windows[5:]]
    parts = split(SPANS, [])
    assert [(edge.a, edge.b) for edge in edges_of(parts, windows)] == [
        (n, n + 1) for n in range(8) if 4 not in (n, n + 1)
    ]


def test_a_loop_that_does_not_agree_with_its_windows_is_rejected() -> None:
    windows = exact()
    loop, edge = tried(0, 152, over(0, 152), [spoiled(windows[0]), *windows[1:]])
    assert loop.found.reaches(SAME_PLACE)
    assert (loop.closed, edge) == (False, None)


def test_a_frame_of_two_windows_stands_between_them_nearer_to_where_it_is_far_from_the_ends() -> None:
    windows = [replace(one, start=0, cam_from_world=torch.eye(4).repeat(len(one), 1, 1)) for one in exact()[:1]] * 2
    windows = [windows[0], replace(windows[1], start=24)]
    parts = [Part(0, 0, 32), Part(1, 24, 56)]
    aside = replace(identity(), translation=torch.tensor([1.0, 0.0, 0.0]).double())
    joined = Joined(parts, [identity(), aside], [[0, 1]], [], [], [], [identity(), aside])
    (piece,) = place_frames(joined, 56, windows.__getitem__)
    x = invert_rigid(piece.cam_from_world)[:, 0, 3]
    weights = torch.arange(1, 9).double()  # of the second window, in which the shared frames are the first eight
    torch.testing.assert_close(x[24:32], weights / (weights + weights.flip(0)))
    assert (x[:24] == 0).all()
    assert (x[32:] == 1).all()


def test_a_false_loop_is_rejected() -> None:
    """Opposite sides of the object, and another world: their points are on no common surface."""
    opposite, edge = tried(0, 76, over(0, 76))
    assert (opposite.closed, edge) == (False, None)
    foreign, edge = tried(0, 152, over(0, 152, short_loop(FRAMES, seed=1001)))
    assert (foreign.closed, edge) == (False, None)
    assert foreign.found.colour < SAME_PLACE.colour


def test_agreement_counts_the_worse_direction() -> None:
    window = over(0, 152)
    there, back = agreement(window, range(8), range(8, 16)), agreement(window, range(8, 16), range(8))
    torch.testing.assert_close(list(vars(there).values()), list(vars(back).values()))
    same = agreement(window, range(8), range(8))
    assert same.depth > 0.95
    assert same.colour > there.colour


def clips(cut: int = 20, frames: int = 40) -> tuple[list[Window], list[tuple[int, int]], torch.Tensor]:
    """Two clips of different worlds, one behind the other, in windows of 16."""
    first, second = short_loop(48), short_loop(48, seed=1001)
    spans = [(0, 16), (8, 24), (16, 32), (24, 40)]
    windows = []
    for number, (start, stop) in enumerate(spans):
        shown = [first.render(start, min(stop, cut))] if start < cut else []
        shown += [second.render(max(start, cut) - cut, stop - cut)] if stop > cut else []
        windows.append(exact_window(of_frames(shown), start, number))
    features = torch.zeros(frames, 8)
    features[:cut, 0], features[cut:, 1] = 1.0, 1.0
    return windows, spans, centred(features + 0.01 * torch.randn(frames, 8, generator=torch.Generator().manual_seed(0)))


def test_a_cut_parts_two_clips() -> None:
    windows, spans, features = clips()
    cuts = find_cuts(spans, features, windows.__getitem__)
    assert cuts == [20]
    parts = split(spans, cuts)
    joined = join(parts, edges_of(parts, windows), [], cuts, windows.__getitem__, with_scale=True)
    found = place_frames(joined, 40, windows.__getitem__)
    assert [piece.frames for piece in found] == [list(range(20)), list(range(20, 40))]
    for piece, seed in zip(found, (1000, 1001), strict=True):
        truth = short_loop(48, seed=seed).cameras.cam_from_world[0, :20]
        assert furthest(piece.cam_from_world, truth) < 1e-3


def test_what_looks_like_a_cut_and_goes_on_is_none() -> None:
    """A flash, for the encoder: the point maps before and behind it agree."""
    features = torch.ones(FRAMES, 8)
    features[20:] *= -1
    assert find_cuts(SPANS, features / 8**0.5, exact().__getitem__) == []


def test_without_features_there_are_no_candidates() -> None:
    assert features_of([(0, None), (8, None)], 16) is None
    assert candidates(split(SPANS, []), None, 16) == []
    assert find_cuts(SPANS, None, exact().__getitem__) == []


@pytest.mark.parametrize(("length", "half"), [(8, 4), (32, 16), (60, 16), (96, 16)])
def test_a_loop_is_tried_by_few_frames_however_long_windows_are(length: int, half: int) -> None:
    """As many as thresholds were chosen with: of more, most see no place that the others see."""
    frames = 4 * length
    angle = 2 * torch.pi * torch.arange(frames) / (frames - 6)
    spans = [(start, start + length) for start in range(0, frames - length + 1, length // 2)]
    parts = split(spans, [])
    found = candidates(parts, centred(torch.stack([angle.cos(), angle.sin()], dim=1)), length)
    assert found
    for one in found:
        for frame, number, (start, stop) in zip(
            (one.match.first, one.match.second), one.parts, one.halves, strict=True
        ):
            assert stop - start == half
            assert max(start, parts[number].start) <= frame < min(stop, parts[number].stop)
