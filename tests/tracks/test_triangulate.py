"""Points of tracks."""

from __future__ import annotations

import numpy as np
import pytest

from geoaccel.tracks import Cameras, Tracks, reprojection_errors, triangulate
from geoaccel.tracks.triangulate import widest_angles
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


def test_angles_between_the_rays_of_a_point():
    """Three cameras at x = -1, 0 and 3: the first and the last see a point before x = 0 under 45 + atan(3) degrees."""
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = 1, 0, -3
    cameras = Cameras(poses, np.ones((3, 2)), np.zeros((3, 2)), [(2, 2)] * 3)
    tracks = Tracks(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1]), np.zeros((5, 2)), "hand")
    found = widest_angles(tracks, cameras, np.array([[0.0, 0, 1], [0, 0, 1]]))
    np.testing.assert_allclose(found, [45 + np.degrees(np.arctan(3)), 45])
