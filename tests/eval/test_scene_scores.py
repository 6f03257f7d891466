"""Scores of predictions whose errors are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geoaccel.backbone import Geometry
from geoaccel.eval.data.synthetic import SceneBatch, sequence
from geoaccel.eval.scene_scores import mean_scores, score_scene

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def scene() -> SceneBatch:
    return sequence(0, frames=3, size=(42, 42))


def perfect(scene: SceneBatch) -> Geometry:
    """The truth at another scale, surest where it is nearest."""
    poses = scene.cam_from_world.clone()
    poses[..., :3, 3] *= 3
    conf = 1 / scene.depth.clamp(min=0.1)
    return Geometry(poses, scene.intrinsics, 3 * scene.depth, 3 * scene.points_world, conf)


def test_the_truth_at_another_scale_is_perfect(scene: SceneBatch) -> None:
    scores = score_scene(perfect(scene), scene)
    assert scores["auc_30"] == scores["auc_3"] == scores["depth_delta_1_25"] == 1
    assert scores["depth_abs_rel"] == pytest.approx(0, abs=1e-5)
    assert scores["chamfer"] == pytest.approx(0, abs=1e-4)


def test_the_larger_angle_of_a_pair_counts(scene: SceneBatch) -> None:
    """The last camera is rolled by 20 degrees about its centre: two of three pairs turn, every place stays right."""
    angle = torch.deg2rad(torch.tensor([0.0, 0.0, 20.0]))
    turn = torch.eye(4).repeat(3, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = -angle.sin(), angle.sin()
    truth = perfect(scene)
    scores = score_scene(replace(truth, cam_from_world=turn @ truth.cam_from_world), scene, points=False)
    assert scores["rotation_median_deg"] == pytest.approx(20, abs=1e-2)
    assert scores["auc_15"] == pytest.approx(1 / 3)
    assert scores["auc_30"] == pytest.approx(1 / 3 + 2 / 3 * 10 / 30, abs=0.03)


def test_depth_and_confidence_errors(scene: SceneBatch) -> None:
    truth = perfect(scene)
    depth = truth.depth.clone()
    depth[:, 0] *= 1.5
    conf = torch.ones_like(depth)
    conf[:, 0] = 0
    scores = score_scene(replace(truth, depth=depth, conf=conf), scene)
    upside_down = score_scene(replace(truth, depth=depth, conf=1 - conf), scene)
    assert scores["depth_abs_rel"] > 0.1
    assert scores["chamfer"] > 0.01
    assert scores["conf_spearman"] > 0.5
    assert upside_down["conf_spearman"] == pytest.approx(-scores["conf_spearman"])


def test_means() -> None:
    assert mean_scores([{"a": 1.0}, {"a": 2.0}]) == {"a": 1.5}
