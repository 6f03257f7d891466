"""The similarity between point maps: exact where points are, in spite of wrong ones, none of too few."""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.alignment import Similarity
from geoaccel.windows.fit import FEWEST, fit_maps
from geoaccel.windows.graph import exponential


def maps(wrong: float = 0.0, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Similarity]:
    """Points of two frames, the same moved, their depth, and how."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(2, 12, 14, 3, generator=generator, dtype=torch.float64)
    moved = exponential(torch.tensor([[0.3, -0.2, 0.5, 1.0, -2.0, 0.5, 0.4]], dtype=torch.float64))
    truth = Similarity(moved.scale[0], moved.rotation[0], moved.translation[0])
    target = truth.apply_points(source.flatten(0, 2)).view_as(source)
    target = target + noise * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    bad = torch.rand(source.shape[:-1], generator=generator) < wrong
    target[bad] += 3 + torch.rand(int(bad.sum()), 3, generator=generator, dtype=torch.float64)
    return source, target, torch.full(source.shape[:-1], 4.0), truth


def test_the_similarity_of_exact_points() -> None:
    source, target, depth, truth = maps()
    fit = fit_maps(source, target, torch.ones_like(depth), torch.ones_like(depth), depth)
    assert fit is not None
    torch.testing.assert_close(fit.similarity.matrix(), truth.matrix(), rtol=0, atol=1e-9)
    assert (fit.agreement, fit.points) == (1.0, depth.numel())


def test_a_third_of_wrong_points_moves_nothing() -> None:
    source, target, depth, truth = maps(wrong=0.33)
    fit = fit_maps(source, target, torch.ones_like(depth), torch.ones_like(depth), depth)
    assert fit is not None
    torch.testing.assert_close(fit.similarity.matrix(), truth.matrix(), rtol=0, atol=0.02)
    assert 0.6 < fit.agreement < 0.75


def test_without_scale_it_is_one() -> None:
    source, target, depth, truth = maps(noise=0.01)
    fit = fit_maps(
        source, target / truth.scale, torch.ones_like(depth), torch.ones_like(depth), depth, with_scale=False
    )
    assert fit is not None
    assert float(fit.similarity.scale) == 1.0
    torch.testing.assert_close(fit.similarity.rotation, truth.rotation, rtol=0, atol=0.01)


def test_what_either_is_not_sure_of_is_left_out() -> None:
    source, target, depth, truth = maps()
    sure = torch.ones_like(depth)
    sure[0] = 0.0
    target[0] += 5.0
    fit = fit_maps(source, target, torch.ones_like(depth), sure, depth)
    assert fit is not None
    torch.testing.assert_close(fit.similarity.matrix(), truth.matrix(), rtol=0, atol=1e-9)
    sure[1] = 0.0
    sure[1].view(-1)[: FEWEST - 1] = 1.0
    assert fit_maps(source, target, sure, sure, depth) is None
