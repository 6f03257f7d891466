"""Which images are compared."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from analytic_scene import AnalyticModel, checked_memory  # noqa: F401 (a fixture)
from torch_work import work_of

from geoaccel.cameras import pixel_grid
from geoaccel.images import ImageTransform
from geoaccel.reconstruction import Reconstruction, reconstruct
from geoaccel.tracks.pairs import ALL_UP_TO, BY_OVERLAP, GRID, IN_ORDER, choose_pairs, predicted_overlap
from geoaccel.tracks.predicted import lift, see

pytestmark = pytest.mark.usefixtures("checked_memory")


def scene(frames: int) -> Reconstruction:
    """Cameras that turn away from each other, depth that is rough and has holes, images of two sizes."""
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * frames
    generator = torch.Generator().manual_seed(frames)
    given = reconstruct(torch.rand(frames, 3, 28, 42, generator=generator), model=AnalyticModel(transforms))
    cameras, angles = given.cam_from_world.clone(), 0.6 * torch.randn(frames, generator=generator)
    turn = torch.eye(4).repeat(frames, 1, 1)
    turn[:, 0, 0], turn[:, 0, 2], turn[:, 2, 0], turn[:, 2, 2] = angles.cos(), angles.sin(), -angles.sin(), angles.cos()
    transforms[1::2] = [ImageTransform((60, 80), (28, 42), (0.5, 0.5), (1.0, -1.0))] * len(transforms[1::2])
    return replace(
        given,
        cam_from_world=turn @ cameras,
        depth=given.depth * (0.8 + 0.4 * torch.rand(given.depth.shape, generator=generator)),
        mask=torch.rand(given.depth.shape, generator=generator) > 0.1,
        transforms=transforms,
    )


def test_overlap_is_what_each_image_sees_of_the_points_of_another() -> None:
    given = scene(20)
    found = np.stack(list(predicted_overlap(given)))
    assert 0.2 < (found > 0).mean() < 0.95
    for i, transform in enumerate(given.transforms):
        height, width = transform.original_size
        pixels = pixel_grid(GRID, GRID).double().numpy().reshape(-1, 2) * (width / GRID, height / GRID)
        points = lift(given, i, pixels)
        wanted = [see(given, j, points).likely.mean() if i != j else 0.0 for j in range(len(given))]
        np.testing.assert_array_equal(found[i], wanted)


def test_pairs_are_all_of_a_few_images_or_neighbours_and_those_that_see_the_same() -> None:
    few = scene(5)
    assert len(choose_pairs(few)) == 10
    given = scene(ALL_UP_TO + 8)
    pairs = choose_pairs(given)
    assert pairs == sorted(set(pairs))
    assert all(i < j for i, j in pairs)
    for i, shared in enumerate(predicted_overlap(given)):
        wanted = {j for j in np.argsort(-shared)[:BY_OVERLAP].tolist() if shared[j] > 0}
        wanted |= set(range(i + 1, min(len(given), i + 1 + IN_ORDER)))
        assert wanted <= {sum(pair) - i for pair in pairs if i in pair}


def test_twice_the_images_take_twice_the_calls() -> None:
    few, many = (work_of(partial(choose_pairs, scene(frames))).calls for frames in (20, 40))
    assert many < 2.2 * few
