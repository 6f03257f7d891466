"""Dense heads that go on learning: only they change, errors count as they are scored, the cameras' unit stays."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geoaccel.cameras import unproject_depth
from geoaccel.eval.data.synthetic import sample_batch
from geoaccel.models.losses import Targets, normalise
from geoaccel.models.objectives import Weights
from geoaccel.models.refinement import REFINEMENTS, Pi3Refinement, VGGTRefinement, scaled_error


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


def vggt_that_answers(depth: Tensor, conf: Tensor) -> Any:
    return SimpleNamespace(
        config={"dpt_layers": ()},
        aggregator=lambda images, keep: ([], 0),
        depth_head=lambda *_: (depth[..., None], conf),
    )


def test_depth_by_hand(images_and_targets: tuple[Tensor, Targets]) -> None:
    images, targets = images_and_targets
    loss = VGGTRefinement.parts

    def parts(depth: Tensor, certainty: float) -> dict[str, float]:
        conf = torch.full_like(depth, certainty)
        found = loss(SimpleNamespace(alpha=0.2), vggt_that_answers(depth, conf), images, targets)  # type: ignore[arg-type]
        return {name: float(value) for name, value in found.items()}

    assert parts(targets.depth, 2.0)["loss_depth"] == pytest.approx(0, abs=1e-6)
    assert parts(targets.depth, 2.0)["loss_conf"] == pytest.approx(-0.2 * math.log(2.0), rel=1e-5)
    # The wrong unit is an error of depth, and none that confidence could know of; smooth as it is, it has no edges.
    larger = parts(1.1 * targets.depth, 2.0)
    assert larger["loss_depth"] == pytest.approx(0.2, rel=0.05)
    assert larger["loss_conf"] == pytest.approx(-0.2 * math.log(2.0), rel=1e-4)
    rough = targets.depth * (1 + 0.1 * (-1.0) ** torch.arange(28))
    found = parts(rough, 2.0)
    # Neighbours in a row differ by 0.2 at every pixel, by nothing at every 2nd, 4th and 8th; those in a column never.
    assert found["loss_depth"] == pytest.approx(2 * 0.1 + 0.3 * 0.2 / 4, rel=1e-3)
    assert found["loss_conf"] > parts(targets.depth, 2.0)["loss_conf"] + 0.1


def test_confidence_by_hand(images_and_targets: tuple[Tensor, Targets]) -> None:
    images, targets = images_and_targets
    local = unproject_depth(targets.depth, targets.intrinsics)

    def doubt(points: Tensor, logit: float) -> float:
        answers = {"local_points": points, "conf": torch.full_like(points[..., :1], logit)}
        found = Pi3Refinement.parts(SimpleNamespace(half_right=0.05), lambda _: answers, images, targets)  # type: ignore[arg-type]
        assert found.keys() == {"loss_conf"}
        return float(found["loss_conf"])

    # In any unit of length.
    for points in (local, local / 4):
        assert doubt(points, 20.0) == pytest.approx(0, abs=1e-4)
        assert doubt(points, -20.0) == pytest.approx(20, rel=1e-3)
    # Fewer than half of the pixels are off, so that they do not move the scale: those are as right as wrong.
    off = local.clone()
    off[:, :, :4] *= 1.05
    share = float(targets.valid[:, :, :4].sum() / targets.valid.sum())
    assert doubt(off, 20.0) == pytest.approx(share * 20 / 2, rel=1e-3)


def test_errors_are_those_after_one_scale(images_and_targets: tuple[Tensor, Targets]) -> None:
    targets = images_and_targets[1]
    scales = torch.tensor([0.5, 3.0])[:, None, None, None]
    assert float(scaled_error(scales * targets.depth, targets).abs().max()) < 1e-5
    off = targets.depth.clone()
    off[:, :, :4] *= 1.2
    found = scaled_error(scales * off, targets)
    seen = targets.valid[:, :, :4]
    assert torch.allclose(found[:, :, :4][seen], torch.tensor(0.2), atol=1e-4)
    assert float(found[~targets.valid].sum()) == 0
