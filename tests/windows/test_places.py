"""Loops and cuts as features show them: alike and far apart in time, and unlike the frame before."""

from __future__ import annotations

import pytest
import torch

from geoaccel.windows import places
from geoaccel.windows.places import centred, matches, suspects


def circle(turns: float, frames: int) -> torch.Tensor:
    """Features that go round, on top of what all frames have in common."""
    angle = 2 * torch.pi * turns * torch.arange(frames) / frames
    return torch.stack([angle.cos(), angle.sin(), 0.3 * (2 * angle).cos()], dim=1) + torch.tensor([50.0, 20.0, 7.0])


def test_the_end_of_a_loop_is_like_its_beginning() -> None:
    found = matches(centred(circle(1.1, 110)), apart=20, near=10, most=9, least=0.99)
    assert found
    assert all(abs(match.second - match.first - 100) <= 2 for match in found)
    for one in found:
        for other in found:
            assert one is other or max(abs(one.first - other.first), abs(one.second - other.second)) >= 10


def test_blocks_change_nothing(monkeypatch) -> None:
    noise = 0.05 * torch.randn(90, 3, generator=torch.Generator().manual_seed(2))
    features = centred(circle(2.0, 90) + noise)
    whole = matches(features, apart=10, near=5, most=50)
    monkeypatch.setattr(places, "BLOCK", 7)
    found = matches(features, apart=10, near=5, most=50)
    assert [(one.first, one.second) for one in found] == [(one.first, one.second) for one in whole]
    # A product of fewer rows may round otherwise.
    assert [one.cosine for one in found] == pytest.approx([one.cosine for one in whole], abs=1e-12)
    assert len(matches(features, apart=10, near=5, most=2)) == 2


def test_a_cut_is_suspected_where_features_jump() -> None:
    features = torch.cat([circle(0.1, 20), -circle(0.1, 15)])
    assert suspects(centred(features)) == [20]
    assert suspects(centred(circle(1.0, 60))) == []
