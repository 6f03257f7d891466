"""Maps change in place where nothing learns, and only there."""

from __future__ import annotations

import pytest
import torch

from geoaccel.models.layers.dpt_head import ResidualConvUnit
from geoaccel.models.layers.rectified import Rectified, add_to, rectify


@pytest.mark.parametrize("learns", [False, True])
def test_what_nobody_reads_is_changed_where_nothing_learns(learns: bool) -> None:
    before = torch.tensor([-1.0, 2.0])
    with torch.set_grad_enabled(learns):
        for change in (rectify, Rectified(), lambda x: add_to(x, torch.tensor([1.0, 0.0]))):
            x = before.clone()
            found = change(x)
            assert found.tolist() == [0.0, 2.0]
            assert torch.equal(x, before if learns else found)


@pytest.mark.parametrize("rectified_skip", [False, True])
@torch.no_grad()
def test_a_unit_leaves_what_it_is_given(rectified_skip: bool) -> None:
    torch.manual_seed(0)
    unit = ResidualConvUnit(4, rectified_skip=rectified_skip)
    x = torch.randn(1, 4, 5, 6)
    before = x.clone()
    found = unit(x)
    assert torch.equal(x, before)
    with torch.enable_grad():
        assert torch.allclose(unit(x), found, atol=1e-6)
