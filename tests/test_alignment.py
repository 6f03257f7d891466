"""The robust similarity: what is wrong is found, and what is left open is said."""

from __future__ import annotations

import pytest
import torch

from geoaccel.alignment import Similarity, robust_similarity, umeyama


def similarity(generator: torch.Generator) -> Similarity:
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    rotation = rotation * torch.linalg.det(rotation)
    return Similarity(torch.tensor(3.7, dtype=torch.float64), rotation, torch.tensor([5.0, -20.0, 90.0]).double())


def matrix_error(found: Similarity, truth: Similarity) -> float:
    return float((found.matrix() - truth.matrix()).abs().max() / truth.matrix().abs().max())


@pytest.mark.parametrize(("count", "wrong"), [(5, 1), (8, 2), (10, 3), (25, 10), (200, 60)])
def test_wrong_points_are_found_and_change_nothing(count: int, wrong: int) -> None:
    generator = torch.Generator().manual_seed(count)
    truth = similarity(generator)
    source = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    target = truth.apply_points(source)
    bad = torch.randperm(count, generator=generator)[:wrong]
    target[bad] += 30 * torch.randn(wrong, 3, generator=generator, dtype=torch.float64)
    fit = robust_similarity(source, target)
    assert sorted((~fit.agrees).nonzero()[:, 0].tolist()) == sorted(bad.tolist())
    assert matrix_error(fit.similarity, truth) < 1e-9
    assert float(fit.residuals[fit.agrees].max()) < 1e-6 < float(fit.residuals[bad].min())
    assert not fit.on_a_line


def test_noise_is_not_taken_for_wrong_points() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = similarity(generator)
    source = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    target = truth.apply_points(source) + 0.05 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    fit = robust_similarity(source, target)
    assert fit.agrees.float().mean() > 0.9
    assert float(fit.similarity.scale) == pytest.approx(3.7, rel=0.01)


def test_points_on_a_line_are_turned_as_little_as_can_be() -> None:
    line = torch.linspace(0, 4, 9, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
    target = 2 * line @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64) + 7
    fit = robust_similarity(line, target)
    assert fit.on_a_line
    torch.testing.assert_close(fit.similarity.apply_points(line), target)
    torch.testing.assert_close(fit.similarity.rotation[:, 2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    # The other way round: half a turn, about any axis across.
    back = robust_similarity(line, -line)
    torch.testing.assert_close(back.similarity.apply_points(line), -line)
    assert float(torch.linalg.det(back.similarity.rotation)) == pytest.approx(1)


def test_what_determines_nothing_is_refused() -> None:
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="2 corresponding points"):
        robust_similarity(points[:2], points[:2])
    with pytest.raises(ValueError, match="all given positions are equal"):
        robust_similarity(points, torch.ones(6, 3))
    with pytest.raises(ValueError, match="all predicted positions are equal"):
        robust_similarity(torch.ones(6, 3), points)


@pytest.mark.parametrize("seed", range(6))
def test_points_that_are_wrong_by_little_are_found_among_noise(seed: int) -> None:
    """Two of ten points are off by a quarter of the extent, the others by 2 % of it."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.nn.functional.normalize(torch.randn(10, 3, generator=generator, dtype=torch.float64), dim=-1)
    target = 5 * source + 0.1 * torch.randn(10, 3, generator=generator, dtype=torch.float64)
    best = umeyama(source[2:], target[2:])
    target[:2] += 1.25 * torch.nn.functional.normalize(torch.randn(2, 3, generator=generator), dim=-1)
    fit = robust_similarity(source, target)
    assert not fit.agrees[:2].any()
    away = (fit.similarity.apply_points(source) - best.apply_points(source)).norm(dim=-1)
    assert float(away.max()) < 0.02 * 5
    assert abs(float(fit.similarity.scale / best.scale) - 1) < 0.01
