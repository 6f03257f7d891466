"""Errors that a plan is chosen by."""

from __future__ import annotations

import pytest
import torch

from geoaccel.backbone import Geometry
from geoaccel.cameras import unproject_depth
from geoaccel.eval.tuning.trials import errors_of


def scene(*places: float) -> Geometry:
    """Cameras side by side, at these places of the x axis."""
    cameras = torch.eye(4).repeat(1, len(places), 1, 1)
    cameras[0, :, 0, 3] = torch.tensor(places)
    intrinsics = torch.tensor([[9.0, 0, 4], [0, 9, 3], [0, 0, 1]]).repeat(1, len(places), 1, 1)
    depth = torch.full((1, len(places), 6, 8), 2.0)
    return Geometry(cameras, intrinsics, depth, unproject_depth(depth, intrinsics, cameras), depth)


def test_a_camera_on_the_opposite_side_is_180_degrees_away() -> None:
    assert errors_of(scene(0, -1), scene(0, 1))["pose_deg"] == pytest.approx(180)


def test_the_median_pair_counts() -> None:
    """Of three pairs one is turned round: the others say that nothing changed."""
    assert errors_of(scene(0, 2, 1), scene(0, 1, 2))["pose_deg"] == 0
    assert errors_of(scene(0, 1), scene(0, 1)) == {"pose_deg": 0, "depth_rel": 0, "points": 0}
