"""Losses of depth and confidence as they are scored, on cases that can be done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geoaccel.eval.data.synthetic import sample_batch
from geoaccel.eval.metrics.depth import depth_errors
from losses import Targets, normalise
from scored_losses import graded_confidence_loss, relative_depth_losses, scaled_error, smooth_median


@pytest.fixture(scope="module")
def targets() -> Targets:
    batch = sample_batch([3, 4], frames=2, size=(28, 28))
    return normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)


def test_depth_by_hand(targets: Targets) -> None:
    def parts(depth: Tensor, certainty: float) -> dict[str, float]:
        found = relative_depth_losses(depth, torch.full_like(depth, certainty), targets)
        return {name: float(value) for name, value in found.items()}

    assert parts(targets.depth, 2.0)["loss_depth"] == pytest.approx(0, abs=1e-6)
    assert parts(targets.depth, 2.0)["loss_conf"] == pytest.approx(-0.2 * math.log(2.0), rel=1e-5)
    # The wrong unit is an error of depth before its scale, and none that confidence could know of; it has no edges.
    larger = parts(1.1 * targets.depth, 2.0)
    assert larger["loss_depth"] == pytest.approx(0.1, rel=0.05)
    assert larger["loss_conf"] == pytest.approx(-0.2 * math.log(2.0), rel=1e-4)
    rough = targets.depth * (1 + 0.1 * (-1.0) ** torch.arange(28))
    found = parts(rough, 2.0)
    # Neighbours in a row differ by 0.2 at every pixel, by nothing at every 2nd, 4th and 8th; those in a column never.
    # What is too large and too small by as much is so after the scale, too, but for where the median falls.
    assert found["loss_depth"] == pytest.approx(2 * 0.1 + 0.3 * 0.2 / 4, rel=0.02)
    assert found["loss_conf"] > parts(targets.depth, 2.0)["loss_conf"] + 0.1


def test_confidence_moves_no_depth(targets: Targets) -> None:
    depth = (1.2 * targets.depth).requires_grad_()
    depth.data[:, :, :4] *= 1.3
    conf = torch.full_like(targets.depth, 2.0).requires_grad_()
    relative_depth_losses(depth, conf, targets)["loss_conf"].backward()
    assert depth.grad is None
    assert float(conf.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_confidence_by_hand(targets: Targets) -> None:
    def doubt(depth: Tensor, logit: float) -> float:
        return float(graded_confidence_loss(depth, torch.full_like(depth, logit), targets))

    # In any unit of length.
    for depth in (targets.depth, targets.depth / 4):
        assert doubt(depth, 20.0) == pytest.approx(0, abs=1e-4)
        assert doubt(depth, -20.0) == pytest.approx(20, rel=1e-3)
    # Fewer than half of the pixels are off, so that they do not move the scale: those are as right as wrong.
    off = targets.depth.clone()
    off[:, :, :4] *= 1.05
    share = float(targets.valid[:, :, :4].sum() / targets.valid.sum())
    assert doubt(off, 20.0) == pytest.approx(share * 20 / 2, rel=1e-3)


def test_errors_are_those_after_one_scale(targets: Targets) -> None:
    scales = torch.tensor([0.5, 3.0])[:, None, None, None]
    assert float(scaled_error(scales * targets.depth, targets).abs().max()) < 1e-5
    off = targets.depth.clone()
    off[:, :, :4] *= 1.2
    found = scaled_error(scales * off, targets)
    seen = targets.valid[:, :, :4]
    assert torch.allclose(found[:, :, :4][seen], torch.tensor(0.2), atol=1e-4)
    assert float(found[~targets.valid].sum()) == 0


def test_the_scale_is_that_of_the_evaluators(targets: Targets) -> None:
    depth = targets.depth.clone()
    depth[:, 0] *= 1.5  # the ratio of medians and the median of ratios differ
    found = scaled_error(depth, targets)
    for own, error, truth, valid in zip(depth, found, targets.depth, targets.valid, strict=True):
        scored = depth_errors(own, truth, mask=valid)
        assert float(error[valid].mean()) == pytest.approx(scored["abs_rel"], rel=0.01)
        other_scale = (truth[valid] / own[valid]).median()
        other = (other_scale * own / truth - 1).abs()[valid].mean()
        assert float(other) != pytest.approx(scored["abs_rel"], rel=0.05)


def test_errors_after_the_scale_do_not_move_it(targets: Targets) -> None:
    torch.manual_seed(0)
    depth = (targets.depth * (1 + 0.1 * torch.randn_like(targets.depth))).requires_grad_()
    scaled_error(depth, targets)[targets.valid].mean().backward()
    assert depth.grad is not None
    pushed = (depth.detach() * depth.grad)[
        targets.valid
    ]  # a larger unit is no error: pixels may move against each other
    assert abs(float(pushed.sum())) < 1e-4 * float(pushed.abs().sum())


@pytest.mark.parametrize("number", [1, 2, 7, 1000])
def test_the_median_reaches_its_neighbours(number: int) -> None:
    torch.manual_seed(number)
    values = torch.rand(number).requires_grad_()
    found = smooth_median(values)
    assert torch.equal(found, values.detach().median())
    found.backward()
    assert values.grad is not None
    share = values.grad / values.grad.sum()
    reached = values.detach()[share > 0]
    assert reached.min() <= values.median() <= reached.max()
    assert len(reached) <= max(2, 0.11 * number)
    assert torch.allclose(share[share > 0], torch.tensor(1 / len(reached)))
