"""Which features of two images are taken for the same."""

from __future__ import annotations

import pytest
import torch

from geoaccel.tracks.matching import _mutual


def unit(cosine: float, axis: int) -> list[float]:
    """A vector at an angle to the first axis, turned towards another one."""
    vector = [cosine, 0.0, 0.0, 0.0]
    vector[axis] = (1 - cosine**2) ** 0.5
    return vector


@pytest.mark.parametrize(("second_best", "found"), [(0.85, 0), (0.80, 1)])
def test_the_second_best_is_farther_by_the_ratio(second_best: float, found: int) -> None:
    """Of distances between unit vectors, whose squares are twice 1 - cosine: 0.1 < 0.64 x 0.2, not < 0.64 x 0.15."""
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    other = torch.tensor([unit(0.9, 1), unit(second_best, 2)])
    matches = _mutual((0, 1), one @ other.T, 0.8, 0.8)
    assert matches.index.tolist() == [[0, 0]] * found


def test_matches_choose_each_other() -> None:
    one = torch.tensor([unit(0.99, 1), [1.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert _mutual((0, 1), one @ other.T, 1.0, 0.5).index.tolist() == [[1, 0]]
