"""Losses on cases that can be done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from small_recipes import SIZE

from geoaccel.attention import AttentionContext, DenseMixer
from geoaccel.cameras import invert_rigid
from geoaccel.eval.data.synthetic import sample_batch
from geoaccel.layout import TokenLayout
from losses import (
    CorrespondenceLoss,
    Targets,
    camera_loss,
    confident_regression_loss,
    correspondences,
    gradient_loss,
    normalise,
    relative_pose_loss,
)


def test_normalised_scenes_start_at_the_first_camera_at_mean_distance_one(targets: Targets) -> None:
    assert torch.allclose(targets.cam_from_world[:, 0], torch.eye(4).expand(2, 4, 4), atol=1e-5)
    for points, valid in zip(targets.points, targets.valid, strict=True):
        assert points[valid].norm(dim=-1).mean() == pytest.approx(1.0, abs=1e-4)
    # Depth, points and poses still belong together.
    z = (targets.cam_from_world[1, 2, :3, :3] @ targets.points[1, 2][..., None])[..., 2, 0]
    z = z + targets.cam_from_world[1, 2, 2, 3]
    valid = targets.valid[1, 2]
    assert torch.allclose(z[valid], targets.depth[1, 2][valid], atol=1e-4)


def test_camera_loss_by_hand() -> None:
    target = torch.zeros(1, 1, 9)
    stage = torch.tensor([[[300.0, 0, 0, 0.4, 0, 0, 0, 1.0, 1.0]]])
    one = 100 / 3 + 0.4 / 4 + 0.5 * 1.0  # translation is clamped at 100
    assert camera_loss([stage], target) == pytest.approx(one)
    assert camera_loss([stage, target], target) == pytest.approx(0.6 * one / 2)


def test_relative_poses_do_not_know_the_world_frame_or_the_unit_of_length(targets: Targets) -> None:
    truth = targets.cam_from_world
    nothing = 2 * math.sqrt(1e-5)  # the roots of zero
    assert relative_pose_loss(truth, truth) == pytest.approx(nothing, abs=1e-4)
    moved = truth @ invert_rigid(truth[:, 1:2])
    moved[..., :3, 3] *= 3
    assert relative_pose_loss(moved, truth) == pytest.approx(nothing, abs=1e-3)


def test_relative_poses_by_hand() -> None:
    """Cameras at 0, 1 and 1.01 on a line: one is turned by 60 degrees, or one is put off the line."""
    truth = torch.eye(4).repeat(1, 3, 1, 1)
    truth[0, :, 0, 3] = torch.tensor([0.0, 1.0, 1.01])
    turned = truth.clone()
    turned[0, 0, :3, :3] = torch.tensor([[0.5, -math.sqrt(0.75), 0], [math.sqrt(0.75), 0.5, 0], [0, 0, 1]])
    # T_0 T_j^-1 keeps its translation -R t_j, turned; T_j T_0^-1 has the translation t_j - R' t_0 with t_0 = 0.
    chord = math.sqrt(2)  # 2 sqrt(2) sin(30 degrees)
    expected = 4 / 6 * chord + 2 / 6 * math.sqrt(1e-5)
    # Two of the four pairs that are far enough apart are seen from the turned camera.
    expected += 0.5 * 1.0 + 0.5 * math.sqrt(1e-5)
    assert relative_pose_loss(turned, truth) == pytest.approx(expected, abs=1e-3)
    off = truth.clone()
    off[0, 2, 1, 3] = 0.01  # 0.6 degrees as seen from the first camera, and too close to the second to count
    expected = 1.5 * math.sqrt(1e-5) + 0.5 * math.sqrt(0.01**2 + 1e-5)
    assert relative_pose_loss(off, truth) == pytest.approx(expected, abs=2e-4)


def test_a_knee_spares_small_errors_and_flattens_large_ones() -> None:
    truth = torch.eye(4).repeat(1, 2, 1, 1)
    truth[0, 1, 0, 3] = 1.0

    def off(degrees: float) -> float:
        """The first camera turned: one of the two directions is off by the angle, both rotations by the chord."""
        poses, angle = truth.clone(), math.radians(degrees)
        poses[0, 0, :2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return float(relative_pose_loss(poses, truth, knee=0.1))

    def counted(distance: float) -> float:
        return 0.1 * math.log1p(math.hypot(distance, math.sqrt(1e-5)) / 0.1)

    for degrees in (0.5, 60.0):
        half = math.sin(math.radians(degrees) / 2)
        expected = counted(2 * math.sqrt(2) * half) + (counted(2 * half) + counted(0)) / 2
        assert off(degrees) == pytest.approx(expected, rel=1e-4)
    assert off(1.0) / off(0.5) > 1.5
    assert off(120.0) / off(60.0) < 1.3


def test_relative_poses_that_collapse_have_bounded_gradients(targets: Targets) -> None:
    poses = targets.cam_from_world.clone()
    poses[..., :3, 3] = 1e-6 * torch.randn((*poses.shape[:2], 3), generator=torch.Generator().manual_seed(0))
    poses.requires_grad_()
    relative_pose_loss(poses, targets.cam_from_world).backward()
    assert poses.grad is not None
    assert 0 < float(poses.grad.norm()) < 200


def test_confident_regression_by_hand() -> None:
    prediction, target = torch.tensor([[[3.0]]]), torch.tensor([[[1.0]]])
    conf, valid = torch.tensor([[math.e]]), torch.tensor([[True]])
    loss = confident_regression_loss(prediction, conf, target, valid)
    assert loss == pytest.approx(2 * math.e - 0.2 + 2, rel=1e-6)
    assert confident_regression_loss(prediction, conf, target, ~valid) == 0


def test_gradient_loss_ignores_a_constant_error() -> None:
    target = torch.rand(2, 16, 16, 1, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    assert gradient_loss(target + 3, target, valid) == pytest.approx(0, abs=1e-5)
    ramp = torch.arange(16.0)[None, :, None, None].expand(1, 16, 16, 1)
    # One unit a row at the finest scale, 2, 4 and 8 at the next ones.
    assert gradient_loss(ramp, torch.zeros_like(ramp), valid[:1]) == pytest.approx((1 + 2 + 4 + 8) / 4)


def test_correspondences_point_at_the_same_surface(targets: Targets) -> None:
    patch = 14
    grid = SIZE // patch
    match = correspondences(targets, patch)
    assert match.shape == (2, 3 * grid * grid, 3)
    own = torch.arange(3).repeat_interleave(grid * grid)
    assert (match.gather(2, own[None, :, None].expand(2, -1, 1)) == -1).all()
    assert (match >= 0).any()
    centre = slice(patch // 2, None, patch)
    points = targets.points[:, :, centre, centre].flatten(1, 3)
    for scene, token, frame in (match >= 0).nonzero()[:200].tolist():
        row, column = divmod(int(match[scene, token, frame]), grid)
        cell = targets.points[scene, frame, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        size = points[scene, token].norm()
        assert (cell - points[scene, token]).norm(dim=-1).min() < 0.15 * (size + 1)


def test_identical_frames_match_themselves() -> None:
    batch = sample_batch([1_000_000], frames=1, size=(SIZE, SIZE))
    twice = [t.repeat(1, 2, *[1] * (t.ndim - 2)) for t in
             (batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)]  # fmt: skip
    match = correspondences(normalise(*twice), 14)
    seen = match[0, :16, 1]
    assert ((seen == torch.arange(16)) | (seen == -1)).all()
    assert (seen >= 0).any()


def test_correspondence_mixer_mixes_densely_and_scores_perfect_attention() -> None:
    layout = TokenLayout(batch=1, frames=2, grid=(1, 3), num_special=1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3))
    context = AttentionContext("global", layout=layout)
    mixer = CorrespondenceLoss(heads=2)
    out, restore = mixer(q, k, v, q, context)
    assert restore is None
    assert torch.equal(out, DenseMixer()(q, k, v, q, context)[0])
    assert mixer.loss is None

    basis = torch.eye(8)[:3] * 40  # patch i of either frame looks like basis vector i
    tokens = torch.cat([torch.zeros(1, 8), basis, torch.zeros(1, 8), basis]).expand(1, 4, 8, 8)
    mixer.targets = torch.full((1, 6, 2), -1)
    mixer.targets[0, :3, 1] = mixer.targets[0, 3:, 0] = torch.arange(3)
    mixer(tokens, tokens, v, tokens, context)
    assert float(mixer.loss) == pytest.approx(0, abs=1e-4)
    assert mixer.accuracy == 1
    mixer.targets = mixer.targets.where(mixer.targets < 0, (mixer.targets + 1) % 3)
    mixer(tokens, tokens, v, tokens, context)
    assert mixer.accuracy == 0
    assert float(mixer.loss) > 100
