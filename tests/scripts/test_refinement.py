"""Dense heads that go on learning: only they change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from geoaccel.eval.data.synthetic import sample_batch
from losses import Targets, normalise
from objectives import Weights
from refinement import REFINEMENTS
from scored_losses import graded_confidence_loss, relative_depth_losses


@pytest.fixture(scope="module")
def images_and_targets() -> tuple[Tensor, Targets]:
    batch = sample_batch([3, 4], frames=2, size=(28, 28))
    return batch.images, normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)


@pytest.fixture
def learning(tiny: nn.Module) -> tuple[nn.Module, nn.Module]:
    return tiny, REFINEMENTS[tiny.backbone.name](tiny)  # type: ignore[union-attr, index]


def test_only_the_dense_heads_learn(
    learning: tuple[nn.Module, nn.Module], images_and_targets: tuple[Tensor, Targets]
) -> None:
    model, refinement = learning
    parts = refinement(model.train(), *images_and_targets, Weights())
    parts["loss"].backward()
    total = sum(value.detach() for name, value in parts.items() if name.startswith("loss_"))
    assert parts["loss"].detach() == pytest.approx(total)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert all(name.startswith(tuple(f"{head}." for head in refinement.heads)) for name in moved)  # type: ignore[union-attr]
    assert {name.partition(".")[0] for name in moved} == set(refinement.heads)  # type: ignore[arg-type]


def test_learning_lowers_the_loss_and_leaves_cameras(
    learning: tuple[nn.Module, nn.Module], images_and_targets: tuple[Tensor, Targets]
) -> None:
    model, refinement = learning
    images, targets = images_and_targets
    key = "pose_enc" if "depth" in getattr(model, "heads", ()) else "camera_poses"
    with torch.no_grad():
        cameras = model.eval()(images)[key]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        parts = refinement(model.train(), images, targets, Weights())
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: float(value) for name, value in parts.items()})
    learnt = "loss_depth" if "loss_depth" in losses[0] else "loss_conf"
    assert losses[-1][learnt] < 0.9 * losses[0][learnt]
    with torch.no_grad():
        assert torch.equal(model.eval()(images)[key], cameras)


def test_the_loss_is_weighed(learning: tuple[nn.Module, nn.Module], images_and_targets: tuple[Tensor, Targets]) -> None:
    model, refinement = learning
    with torch.no_grad():
        one, two = (refinement(model, *images_and_targets, Weights(dense=dense))["loss"] for dense in (1.0, 2.0))
    assert float(two) == pytest.approx(2 * float(one))


def test_losses_are_those_of_depth_as_it_is_scored(
    learning: tuple[nn.Module, nn.Module], images_and_targets: tuple[Tensor, Targets]
) -> None:
    model, refinement = learning
    images, targets = images_and_targets
    with torch.no_grad():
        found, outputs = refinement(model, images, targets, Weights(dense=1.0)), model(images)
        geometry = model.backbone.geometry(outputs, (28, 28))  # type: ignore[operator, union-attr]
    if "conf" in outputs:  # pi3, in logits
        expected = {"loss_conf": graded_confidence_loss(geometry.depth, outputs["conf"][..., 0], targets)}
    else:
        expected = relative_depth_losses(geometry.depth, outputs["depth_conf"], targets)
    assert found.keys() == {"loss", *expected}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
