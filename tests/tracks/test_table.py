"""Tracks: joined from matches, one observation of each image, and parts of them."""

from __future__ import annotations

import numpy as np
import pytest

from geoaccel.tracks import Tracks, without_short
from geoaccel.tracks.table import join

PIXELS = np.arange(14.0).reshape(7, 2)


def test_matches_join_to_one_track_over_all_images():
    tracks = join([(0, 1), (2, 3), (1, 2)], np.array([0, 1, 2, 3, 0, 1, 2]), PIXELS, "a test")
    assert len(tracks) == 1
    assert tracks.frame.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(tracks.pixels, PIXELS[:4])
    assert "1 tracks by a test, 100 %" in str(tracks)


def test_a_track_has_one_place_in_an_image():
    frame = np.array([0, 1, 0, 2, 0, 1, 2])
    tracks = join([(0, 1), (1, 2), (2, 3), (1, 3)], frame, PIXELS, "a test")  # node 2 is of image 0, as node 0 is
    assert len(tracks) == 2
    for n in range(2):
        own = tracks.frame[tracks.track == n]
        assert len(own) == len(set(own.tolist())) == 2


def test_keep_leaves_no_track_of_one_observation():
    tracks = Tracks(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 2]), PIXELS[:5], "a test")
    kept, rows = tracks.keep(np.array([True, False, True, False, True]))
    assert rows.tolist() == [1]
    assert kept.track.tolist() == [0, 0]
    assert kept.frame.tolist() == [0, 2]
    assert len(tracks.where(np.array([True, False]))) == 1


def places(tracks, n):
    """What one track shows: frame and pixel of each observation."""
    own = tracks.track == n
    return list(zip(tracks.frame[own].tolist(), *tracks.pixels[own].T.tolist(), strict=True))


def test_observations_of_each_frame():
    tracks = Tracks(np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 2, 0, 1, 3, 2, 3]), PIXELS, "a test")
    found = tracks.of_each(6)
    assert [own.tolist() for own in found] == [np.flatnonzero(tracks.frame == i).tolist() for i in range(6)]
    assert [len(own) for own in join([], np.zeros(0, np.int64), np.zeros((0, 2)), "a test").of_each(2)] == [0, 0]


@pytest.mark.parametrize("kept", [[0, 1, 3], [3, 1, 0], [1, 2], [2], []])
def test_some_of_the_frames_are_numbered_anew(kept):
    tracks = Tracks(np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 2, 0, 1, 3, 2, 3]), PIXELS, "a test")
    found = tracks.of_frames(kept)
    wanted = [sorted((kept.index(f), u, v) for f, u, v in places(tracks, n) if f in kept) for n in range(3)]
    assert [places(found, n) for n in range(len(found))] == [track for track in wanted if len(track) >= 2]


@pytest.mark.parametrize(("long", "left"), [(60, 60), (20, 25)])
def test_tracks_of_two_views_stay_where_an_image_has_few_others(long, left):
    lengths = [3] * long + [2] * 5
    track = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.concatenate([np.arange(n) for n in lengths])
    tracks = Tracks(track, frame, np.zeros((len(track), 2)), "a test")
    assert len(without_short(tracks, 3)) == left


def test_nothing_is_nothing():
    tracks = join([], np.zeros(0, np.int64), np.zeros((0, 2)), "a test")
    assert len(tracks) == 0
    assert len(without_short(tracks, 3)) == 0
    assert len(tracks.of_frames([1, 0])) == 0
    assert "0 tracks" in str(tracks)
