"""Points of tracks."""

from __future__ import annotations

import numpy as np
import pytest

from geoaccel.tracks import Cameras, reprojection_errors, triangulate
from measure_refinement import exact_tracks, rendered


@pytest.fixture(scope="module")
def scene():
    return rendered(1003, frames=4, size=112)


def test_exact_tracks_give_points_that_project_onto_them(scene):
    tracks, cameras = exact_tracks(scene), Cameras.of(scene)
    assert len(tracks) > 50
    assert reprojection_errors(tracks, cameras, triangulate(tracks, cameras)).max() < 0.01


def test_one_wrong_observation_does_not_move_a_point_of_many(scene):
    tracks, cameras = exact_tracks(scene), Cameras.of(scene)
    points = triangulate(tracks, cameras)
    longest = int(tracks.lengths().argmax())
    assert tracks.lengths()[longest] == 4
    row = int(np.flatnonzero(tracks.track == longest)[1])
    tracks.pixels[row] += 15
    again = triangulate(tracks, cameras)
    errors = reprojection_errors(tracks, cameras, again)
    assert np.linalg.norm(again[longest] - points[longest]) < 0.01
    assert errors[row] > 15
    assert np.delete(errors, row).max() < 1


def test_points_behind_a_camera_are_infinitely_wrong(scene):
    tracks, cameras = exact_tracks(scene), Cameras.of(scene)
    points = 2 * cameras.centres()[tracks.frame[0]] - triangulate(tracks, cameras)
    assert np.isinf(reprojection_errors(tracks, cameras, points)[tracks.track == 0][0])
