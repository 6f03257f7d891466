"""Trajectory errors, against cases that can be done in the head."""

import numpy as np
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
    with pytest.raises(ValueError, match="at one position"):
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


def root_mean_square(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def as_evo_does(estimate: np.ndarray, truth: np.ndarray, *, align_origin: bool) -> dict[str, float]:
    """evo's APE and RPE with `align` and `correct_scale`, and then `align_origin`, pose by pose; [S, 4, 4] twice."""
    x, y = estimate[:, :3, 3].T, truth[:, :3, 3].T
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    spread = sum(np.sum((column - mean_x) ** 2) for column in x.T) / len(estimate)
    covariance = sum(np.outer(b - mean_y, a - mean_x) for a, b in zip(x.T, y.T, strict=True)) / len(estimate)
    u, d, vt = np.linalg.svd(covariance)
    sign = np.eye(3)
    sign[2, 2] = -1 if np.linalg.det(u) * np.linalg.det(vt) < 0 else 1
    align = np.eye(4)
    align[:3, :3] = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / spread
    align[:3, 3] = mean_y - scale * align[:3, :3] @ mean_x
    moved = []
    for pose in estimate:
        scaled = pose.copy()
        scaled[:3, 3] *= scale
        moved.append(align @ scaled)
    if align_origin:
        to_origin = truth[0] @ np.linalg.inv(moved[0])
        moved = [to_origin @ pose for pose in moved]

    def turn(error: np.ndarray) -> float:
        sine = np.linalg.norm(error[:3, :3] - np.eye(3)) / 8**0.5  # of half the angle
        cosine = np.sqrt(max(0.0, 1 + np.trace(error[:3, :3]))) / 2
        return float(2 * np.degrees(np.arctan2(sine, cosine)))

    errors = [np.linalg.inv(b) @ a for a, b in zip(moved, truth, strict=True)]
    steps = [
        np.linalg.inv(np.linalg.inv(truth[i]) @ truth[i + 1]) @ (np.linalg.inv(moved[i]) @ moved[i + 1])
        for i in range(len(truth) - 1)
    ]
    return {
        "ate_rmse": root_mean_square([np.linalg.norm(a[:3, 3] - b[:3, 3]) for a, b in zip(moved, truth, strict=True)]),
        "are_rmse_deg": root_mean_square([turn(error) for error in errors]),
        "rpe_translation": root_mean_square([np.linalg.norm(step[:3, 3]) for step in steps]),
        "rpe_rotation_deg": root_mean_square([turn(step) for step in steps]),
        "ate_scale": scale,
    }


@pytest.mark.parametrize("fastvggt_compat", [False, True])
def test_two_hundred_trajectories_as_evo_has_them(fastvggt_compat):
    """As published for positions and turns; FastVGGT's script hands camera-from-world over, and aligns origins too."""
    ratios = []
    for seed in range(200):
        count = 3 + seed % 10
        gt = random_poses(count, seed)
        pred = random_similarity(seed).apply_poses(jitter(gt, 0.02 + 0.003 * seed, seed))
        found = trajectory_errors(pred, gt, fastvggt_compat=fastvggt_compat)
        handed = [poses if fastvggt_compat else invert_rigid(poses) for poses in (pred, gt)]
        expected = as_evo_does(*(poses.numpy() for poses in handed), align_origin=fastvggt_compat)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), (seed, name)
        ratios.append(found["ate_rmse"] / as_evo_does(*(p.numpy() for p in handed), align_origin=False)["ate_rmse"])
    assert (np.median(ratios) > 1.1) == fastvggt_compat  # an origin that must fit makes the rest fit less


def test_ate_does_not_see_a_turn_and_are_does():
    """All cameras are rolled by 12 degrees about their centres; but the first, where the origin is aligned by it."""
    gt = random_poses(6, 2)
    rolled = gt.clone()
    rolled[:, :3] = rotation_about("z", 12) @ gt[:, :3]
    errors = absolute_trajectory_error(rolled, gt)
    assert errors["ate_rmse"] == pytest.approx(0, abs=1e-9)
    assert errors["are_rmse_deg"] == pytest.approx(12)
    assert absolute_trajectory_error(rolled, gt, align="none")["are_rmse_deg"] == pytest.approx(12)
    assert absolute_trajectory_error(rolled, gt, align_origin=True)["ate_rmse"] > 0.1
    assert absolute_trajectory_error(rolled[:3], gt[:3], align_origin=True)["are_rmse_deg"] < 24


def test_the_root_mean_square_the_mean_and_the_median_differ() -> None:
    """Without alignment, and with one camera of three off by 3."""
    eye = torch.eye(3).expand(3, 3, 3)
    places = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    off = places + torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 3, 0]])
    found = absolute_trajectory_error(poses_from(eye, off), poses_from(eye, places), align="none")
    assert found["ate_rmse"] == pytest.approx(3**0.5)
    assert found["ate_mean"] == pytest.approx(1)
    assert found["ate_median"] == 0
