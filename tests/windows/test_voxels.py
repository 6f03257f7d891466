"""A cloud that is thinned as it grows: which point of a cube stays, and what happens where there are too many."""

from __future__ import annotations

import numpy as np

from geoaccel.windows import voxels
from geoaccel.windows.voxels import Voxels


def add(cloud: Voxels, places: list[list[float]], ranks: list[int], frame: int) -> None:
    count = len(places)
    pixels = np.stack([np.arange(count), np.zeros(count)], axis=1)
    rgb = np.full((count, 3), frame, np.uint8)
    cloud.add(np.array(places, np.float32), rgb, np.array(ranks, np.uint8), frame, pixels)


def test_the_surest_point_of_a_cube_stays_and_the_first_of_equally_sure_ones() -> None:
    cloud = Voxels(side=1.0, most=None)
    add(cloud, [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [1.1, 0.1, 0.1], [-0.1, 0.1, 0.1]], [10, 200, 50, 1], frame=0)
    add(cloud, [[0.9, 0.9, 0.9], [1.9, 0.9, 0.9]], [90, 50], frame=1)
    found = cloud.points()
    assert sorted(round(float(x), 3) for x in found["xyz"][:, 0]) == [-0.1, 0.2, 1.1]
    assert set(found["frame"].tolist()) == {0}
    assert cloud.seen == 6


def test_it_is_thinned_as_it_grows_with_the_same_points(monkeypatch) -> None:
    places = np.random.default_rng(0).random((400, 3)).tolist()
    ranks = np.random.default_rng(1).integers(1, 255, 400).tolist()
    whole = Voxels(0.2, None)
    add(whole, places, ranks, frame=0)
    monkeypatch.setattr(voxels, "BATCH", 50)
    often = Voxels(0.2, None)
    for start in range(0, 400, 40):
        add(often, places[start : start + 40], ranks[start : start + 40], frame=0)
    assert len(often._kept) + sum(map(len, often._new)) < 200
    assert {*map(tuple, whole.points()["xyz"].tolist())} == {*map(tuple, often.points()["xyz"].tolist())}


def test_cubes_grow_where_there_are_too_many_points() -> None:
    cloud = Voxels(0.05, 60)
    add(cloud, np.random.default_rng(0).random((400, 3)).tolist(), [1] * 400, frame=0)
    assert 20 < len(cloud.points()) <= 60
    assert cloud.side > 0.05
