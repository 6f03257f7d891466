"""Medians that can be done by hand."""

from __future__ import annotations

import torch

from geoaccel.models.robust import weighted_median


def test_half_of_the_weight_lies_on_either_side() -> None:
    values = torch.tensor([[30.0, 10.0, 20.0], [1.0, 2.0, 3.0]])
    weights = torch.tensor([[1.0, 5.0, 1.0], [1.0, 1.0, 1.0]])
    assert weighted_median(values, weights).tolist() == [10.0, 2.0]


def test_it_minimises_the_weighted_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(101, generator=generator), torch.rand(101, generator=generator)
    cost = (weights * (values[:, None] - values).abs()).sum(-1)
    assert weighted_median(values, weights) == values[cost.argmin()]
