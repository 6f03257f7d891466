"""Losses on cases that can be done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from geoaccel.attention import AttentionContext, DenseMixer
from geoaccel.cameras import invert_rigid
from geoaccel.eval.data.synthetic import sample_batch
from geoaccel.layout import TokenLayout
from geoaccel.models import build
from losses import (
    CorrespondenceLoss,
    Targets,
    camera_loss,
    confident_regression_loss,
    correspondences,
    first_frames,
    gradient_loss,
    normalise,
    relative_pose_loss,
)
from objectives import Pi3Objective, VGGTObjective, Weights, align_scale
from scored_losses import graded_confidence_loss, relative_depth_losses

SIZE = 56


@pytest.fixture(scope="module")
def targets() -> Targets:
    batch = sample_batch([1_000_000, 1_000_001], frames=3, size=(SIZE, SIZE))
    return normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)


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


def test_objective_has_gradients_everywhere(targets: Targets) -> None:
    torch.manual_seed(0)
    model = build("vggt", img_size=SIZE, embed_dim=32, depth=4, num_heads=2, vit_depth=1, vit_num_heads=2,
                  camera_head_num_heads=2, camera_trunk_depth=1, dpt_features=8, dpt_out_channels=(8, 8, 8, 8),
                  dpt_layers=(0, 1, 2, 3), heads=("camera", "depth", "point"))  # fmt: skip
    objective = VGGTObjective(model)
    weights = Weights(relative=1.0)
    parts = objective(model, torch.rand(2, 3, 3, SIZE, SIZE), targets, weights, autocast=torch.bfloat16)
    assert float(parts["loss_relative"]) > 0.1
    total = sum(float(value) for name, value in parts.items() if name.startswith("loss_"))
    assert float(parts["loss"]) == pytest.approx(total, rel=1e-5)
    parts["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # Unused by design, or behind the first pass of the camera head only.
    assert without <= {"aggregator.patch_embed.mask_token"}, without
    only_camera = objective(
        model, torch.rand(2, 3, 3, SIZE, SIZE), targets, Weights(patch=0, correspondence=0, dense=0)
    )
    assert set(only_camera) == {"loss", "loss_camera"}


def test_the_whole_network_learns_depth_as_it_is_scored(targets: Targets) -> None:
    model = build("vggt", img_size=SIZE, embed_dim=32, depth=4, num_heads=2, vit_depth=1, vit_num_heads=2,
                  camera_head_num_heads=2, camera_trunk_depth=1, dpt_features=8, dpt_out_channels=(8, 8, 8, 8),
                  dpt_layers=(0, 1, 2, 3), heads=("camera", "depth", "point"))  # fmt: skip
    objective, images = VGGTObjective(model), torch.rand(2, 3, 3, SIZE, SIZE)

    def parts(**given: float) -> dict[str, torch.Tensor]:
        return objective(model, images, targets, Weights(camera=0, patch=0, correspondence=0, dense=0, **given))

    def expected(frames: int) -> dict[str, torch.Tensor]:
        features, start = model.aggregator(images, keep=model.config.dpt_layers)
        features = [feature if feature is None else feature[:, :frames] for feature in features]
        depth, conf = model.depth_head(features, images[:, :frames], start, None)
        return relative_depth_losses(depth[..., 0], conf, first_frames(targets, frames))

    assert set(parts()) == {"loss", "loss_camera"}
    for frames, given in ((3, {"scored": 1.0}), (2, {"scored": 1.0, "scored_frames": 2})):
        found = parts(**given)
        assert set(found) == {"loss", "loss_camera", "loss_depth", "loss_conf"}
        for name, value in expected(frames).items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4)
    assert float(parts(scored=2.0)["loss"]) == pytest.approx(2 * float(parts(scored=1.0)["loss"]), rel=1e-4)
    # Confidence reaches the blocks that all heads read.
    parts(scored=1.0)["loss_conf"].backward()
    site = model.aggregator.global_blocks[0].attn.qkv.weight
    assert float(site.grad.abs().sum()) > 0
    # Points go on with the losses of the paper; depth is not learned twice.
    both = objective(model, images, targets, Weights(scored=1.0))
    assert float(both["loss_depth"]) == pytest.approx(float(expected(3)["loss_depth"]), rel=1e-4)
    assert "loss_point" in both


def small_pi3() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("pi3", img_size=SIZE, vit_dim=32, vit_depth=1, vit_num_heads=2, decoder_dim=32, decoder_depth=4,
                 decoder_num_heads=2, head_decoder_dim=32, head_decoder_depth=1, head_decoder_num_heads=2,
                 camera_dim=16)  # fmt: skip


def test_pi3_objective_does_not_know_the_order_of_the_frames(targets: Targets) -> None:
    model = small_pi3()
    objective = Pi3Objective(model)
    images = torch.rand(2, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    order = [2, 0, 1]
    fields = {
        name: getattr(targets, name)[:, order] for name in ("cam_from_world", "intrinsics", "depth", "points", "valid")
    }
    permuted = Targets(**fields, scale=targets.scale)
    straight, turned = (
        objective(model, images, targets, Weights(relative=1.0)),
        objective(model, images[:, order], permuted, Weights(relative=1.0)),
    )
    for name in ("loss_point", "loss_camera", "loss_relative", "loss_conf"):
        assert float(turned[name]) == pytest.approx(float(straight[name]), rel=1e-4), name
    straight["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]


def test_pi3_learns_graded_confidence(targets: Targets) -> None:
    model, images = small_pi3(), torch.rand(2, 3, 3, SIZE, SIZE)
    objective = Pi3Objective(model)
    found = objective(model, images, targets, Weights(scored=2.0))
    answers = model(images)
    graded = graded_confidence_loss(answers["local_points"][..., 2], answers["conf"][..., 0], targets)
    assert float(found["loss_conf"]) == pytest.approx(2 * float(graded), rel=1e-4)
    assert float(objective(model, images, targets, Weights())["loss_conf"]) < 0.5 * float(found["loss_conf"])


def test_pi3_pose_loss_is_nothing_for_the_truth_in_any_frame_and_scale(targets: Targets) -> None:
    objective = Pi3Objective(small_pi3())
    world = invert_rigid(targets.cam_from_world)
    moved = invert_rigid(targets.cam_from_world[:, 1:2]) @ world  # another world frame
    moved[..., :3, 3] /= 2.5
    assert float(objective.pose_loss(moved, targets, torch.full((2,), 2.5))) == pytest.approx(0.001, abs=1e-4)
    world[:, 1, :3, 3] += 1
    assert float(objective.pose_loss(world, targets, torch.ones(2))) > 0.1


def test_scale_alignment_is_exact_and_survives_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 8, 8, 3, generator=generator) + 0.5
    predicted = target / torch.tensor([3.0, 0.2]).view(2, 1, 1, 1, 1)
    weight = torch.ones(2, 3, 8, 8)
    predicted[:, :, :2] = 1e-3
    assert torch.allclose(align_scale(predicted, target, weight), torch.tensor([3.0, 0.2]), rtol=1e-4)
