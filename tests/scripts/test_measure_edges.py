"""What is counted of the edge filter, on a scene that can be counted by hand."""

from __future__ import annotations

import pytest
import torch

import measure_edges


def test_shares_of_a_wall_with_an_object_before_it() -> None:
    """Six columns: object, object, one between (off), wall, wall, sky; predicted at twice the true scale."""
    truth = torch.tensor([2.0, 2, 4, 4, 4, 0]).expand(1, 10, 6)
    depth = torch.tensor([4.0, 4, 6, 8, 8, 8]).expand(1, 10, 6)
    everywhere = torch.ones(1, 10, 6, dtype=torch.bool)
    found = measure_edges.shares(truth, depth, torch.ones(1, 10, 6), everywhere, jump=0.4)
    expected = {"before": 0.2, "after": 0.0, "still": 0.0, "lost": 2 / 6, "lost_of_known": 2 / 5}
    assert found == pytest.approx(expected)
    figures = measure_edges.summary(
        [found, {**expected, "after": 0.1, "still": 0.05, "lost": 0.0, "lost_of_known": 0.0}]
    )
    means = {name: value["mean"] if isinstance(value, dict) else value for name, value in figures.items()}
    assert means == pytest.approx(
        {
            "off_before": 20,
            "off_after": 5,
            "off_less": 15,
            "share_falls": 75,
            "number_falls": 87.5,
            "lost": 16.67,
            "lost_of_known": 20,
        }
    )
    assert (figures["off_less"]["low"], figures["off_less"]["high"]) == (10, 20)
