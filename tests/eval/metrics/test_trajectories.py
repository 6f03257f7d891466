"""Trajectory errors, against cases that can be done in the head."""

import pytest
import torch
from hypothesis import given, settings
from random_poses import jitter, poses_from, random_poses, random_similarity, rotation_about, seeds

from geoaccel.cameras import invert_rigid
from geoaccel.eval.metrics.trajectories import absolute_trajectory_error, relative_pose_error, trajectory_errors


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_ate_undoes_a_similarity(seed):
    gt = random_poses(6, seed)
    similarity = random_similarity(seed)
    errors = trajectory_errors(similarity.apply_poses(gt), gt)
    assert max(errors["ate_rmse"], errors["rpe_translation"], errors["rpe_rotation_deg"]) < 1e-9
    assert errors["ate_scale"] == pytest.approx(1 / float(similarity.scale))


def test_ate_in_the_head():
    eye = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    square = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]], dtype=torch.float64)
    bent = square + torch.tensor([[0.0, 0, 1], [0, 0, -1], [0, 0, 1], [0, 0, -1]], dtype=torch.float64)
    errors = absolute_trajectory_error(poses_from(eye, bent), poses_from(eye, square), align="se3")
    assert errors["ate_rmse"] == pytest.approx(1)
    assert errors["ate_mean"] == pytest.approx(1)
    assert errors["ate_scale"] == 1
    shifted = poses_from(eye, square + torch.tensor([3.0, 0, 4]))
    assert absolute_trajectory_error(shifted, poses_from(eye, square), align="none")["ate_median"] == 5
    # A prediction that stands still is as far off as the cameras are from their mean.
    standing = poses_from(eye, torch.zeros(4, 3, dtype=torch.float64))
    assert absolute_trajectory_error(standing, poses_from(eye, square))["ate_rmse"] == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="at one place"):
        absolute_trajectory_error(poses_from(eye, square), standing)
    with pytest.raises(ValueError, match="Known: sim3, se3, none"):
        absolute_trajectory_error(standing, standing, align="affine")


def test_rpe_in_the_head(this_processor):
    eye = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    steps = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]], dtype=torch.float64)
    gt = poses_from(eye, steps)
    assert relative_pose_error(poses_from(eye, 2 * steps), gt)["rpe_translation"] == pytest.approx(1)
    assert relative_pose_error(poses_from(eye, 2 * steps), gt, scale=0.5)["rpe_translation"] == 0
    turned = gt.clone()
    turned[2, :3] = rotation_about("z", 30) @ turned[2, :3]
    assert relative_pose_error(turned, gt)["rpe_rotation_deg"] == pytest.approx(30 / 2**0.5)
    assert relative_pose_error(turned, gt, delta=2)["rpe_rotation_deg"] == pytest.approx(30)
    with pytest.raises(ValueError, match="more than 3 frames"):
        relative_pose_error(gt, gt, delta=3)


def test_fastvggt_mode_measures_translations_of_cam_from_world():
    gt, pred = random_poses(5, 1), jitter(random_poses(5, 1), 0.3)
    compat = trajectory_errors(pred, gt, fastvggt_compat=True)
    assert compat["ate_rmse"] == pytest.approx(
        absolute_trajectory_error(invert_rigid(pred), invert_rigid(gt))["ate_rmse"]
    )
    assert abs(compat["ate_rmse"] - trajectory_errors(pred, gt)["ate_rmse"]) > 1e-3


def test_the_root_mean_square_the_mean_and_the_median_differ() -> None:
    """Without alignment, and with one camera of three off by 3."""
    eye = torch.eye(3).expand(3, 3, 3)
    places = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    off = places + torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 3, 0]])
    found = absolute_trajectory_error(poses_from(eye, off), poses_from(eye, places), align="none")
    assert found["ate_rmse"] == pytest.approx(3**0.5)
    assert found["ate_mean"] == pytest.approx(1)
    assert found["ate_median"] == 0
