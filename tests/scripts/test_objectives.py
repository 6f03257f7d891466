"""Objectives of both minis: what they teach, and what must not matter to them."""

from __future__ import annotations

import pytest
import torch
from small_recipes import SIZE

from geoaccel.cameras import invert_rigid
from geoaccel.models import build
from losses import Targets, first_frames
from objectives import Pi3Objective, VGGTObjective, Weights, align_scale
from scored_losses import graded_confidence_loss, relative_depth_losses


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
    outputs = model(images)
    graded = graded_confidence_loss(outputs["local_points"][..., 2], outputs["conf"][..., 0], targets)
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
