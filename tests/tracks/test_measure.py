"""Tracks that are measured in photographs."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from geoaccel.errors import UserError
from geoaccel.tracks import Cameras, measure_tracks, reprojection_errors, triangulate
from geoaccel.tracks.features import find_features, require_pycolmap
from measure_refinement import rendered, spoiled

pytest.importorskip("pycolmap")


@pytest.fixture(scope="module")
def truth():
    return rendered(1003, frames=4, size=224)


@pytest.fixture(scope="module")
def tracks(truth):
    return measure_tracks(spoiled(truth))


def test_tracks_are_where_the_true_cameras_see_one_point(truth, tracks):
    cameras = Cameras.of(truth)
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    assert len(tracks) > 150
    assert np.median(errors) < 0.5
    assert (errors < 2).mean() > 0.9
    assert np.bincount(tracks.frame, minlength=4).min() > 60


def test_most_tracks_are_of_three_views_or_more(tracks):
    assert (tracks.lengths() >= 3).mean() > 0.5
    keys = tracks.track * 4 + tracks.frame
    assert len(np.unique(keys)) == len(keys)


def test_they_are_no_projections_of_predicted_points(truth, tracks):
    cameras = Cameras.of(spoiled(truth))
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    assert np.median(errors) > 1  # what wrong cameras say


def test_the_same_every_time(truth, tracks):
    again = measure_tracks(spoiled(truth))
    np.testing.assert_array_equal(again.pixels, tracks.pixels)


def test_a_prediction_that_is_all_wrong_is_not_believed(truth, caplog):
    turned = replace(truth, cam_from_world=truth.cam_from_world.roll(1, dims=0))
    tracks = measure_tracks(turned)
    cameras = Cameras.of(truth)
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    assert "disagree with the predicted cameras" in caplog.text
    assert len(tracks) > 50
    assert np.median(errors) < 1


def test_images_without_anything_to_recognise(truth):
    grey = torch.full((224, 224, 3), 128, dtype=torch.uint8)
    blank = replace(truth, read_original=lambda i: grey)
    assert len(measure_tracks(blank)) == 0


def test_large_photographs_are_looked_at_in_a_smaller_size(truth, monkeypatch):
    from geoaccel.tracks import features

    monkeypatch.setattr(features, "LARGEST", 112)
    found = find_features(truth)
    assert found[0].picture.shape == (112, 112)
    assert found[0].scale == 2
    assert found[0].pixels.max() > 112


def test_no_more_originals_are_read_at_a_time_than_there_is_room_for(truth, monkeypatch):

    reading, most = threading.Semaphore(0), []

    def read(i):
        reading.release()
        time.sleep(0.05)
        most.append(reading._value)
        reading.acquire()
        return truth.read_original(i)

    monkeypatch.setattr("geoaccel.images.threads.PIXELS_AT_ONCE", 1)
    monkeypatch.setattr("geoaccel.images.threads.usable_cores", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert len(find_features(replace(truth, read_original=read))) == 4
    assert most == [1] * 4


def test_without_pycolmap_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    with pytest.raises(UserError, match=r"pip install 'geoaccel\[refine\]'"):
        require_pycolmap("a test")


def test_what_masks_leave_out_is_not_measured(truth):
    """A still foreground, as a car's hood, agrees with itself in every image."""
    hood = np.random.default_rng(0).integers(0, 255, (12, 32, 3), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
    pictures = [truth.read_original(i).clone() for i in range(len(truth))]
    for picture in pictures:
        picture[-84:] = torch.from_numpy(hood)
    selected = torch.ones_like(truth.mask)
    selected[:, -84:] = False
    scene = replace(spoiled(truth), read_original=lambda i: pictures[i])
    assert (measure_tracks(scene).pixels[:, 1] > 140).any()
    tracks = measure_tracks(replace(scene, selected=selected))
    assert len(tracks) > 50
    assert (tracks.pixels[:, 1] < 140).all()
