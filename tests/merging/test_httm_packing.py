"""HTTM inside the packed rows of Co-Me."""

from __future__ import annotations

import pytest
import torch
from httm_heads import DIM
from references import relative_error
from torch import nn

import geoaccel
from geoaccel.merging.alike import Alike
from geoaccel.merging.httm import HTTM
from geoaccel.plan import MergePlan


@torch.no_grad()
def test_inside_packed_rows_weights_enter_means_and_keys(tiny: nn.Module) -> None:
    """Shares are of the packed patches, and where nothing more merges the result is Co-Me's alone."""
    images = torch.rand(1, 4, 3, 70, 98, generator=torch.Generator().manual_seed(0))
    outer = Alike(bypass=False)
    pose = "pose_enc" if "pose_enc" in tiny(images) else "camera_poses"
    alone = geoaccel.accelerate(tiny, merging=outer)(images)[pose]
    same = geoaccel.accelerate(tiny, merging=[outer, HTTM(ratio=0, bypass=False)])(images)[pose]
    assert relative_error(same, alone) < 1e-5
    both = geoaccel.accelerate(tiny, merging=[HTTM(bypass=False), outer])(images)[pose]
    assert relative_error(both, alone) > 1e-6
    actions = {action.method.name: action for action in geoaccel.describe(tiny).merging}
    packed = actions["alike"].effects[0].queries
    inner = actions["httm"].effects[0]
    assert inner.tokens == pytest.approx(packed, rel=0.2)
    assert inner.queries < 0.6 * inner.tokens


def test_packed_rows_count_as_many_tokens_as_they_stand_for() -> None:
    """A row of weight n merges and attends as n equal rows do."""
    generator = torch.Generator().manual_seed(3)
    row, weight = torch.randn(3, 1, 2, 6, DIM, generator=generator), torch.tensor([3.0, 1, 2, 1, 4, 2])
    group_of = torch.tensor([0, 0, 1, 1, 1, 0]).expand(1, 2, -1)
    repeated = row.repeat_interleave(weight.long(), dim=3)
    plan, long_plan = MergePlan(group_of, 2), MergePlan(group_of.repeat_interleave(weight.long(), dim=2), 2)
    for short, whole in zip(row, repeated, strict=True):
        assert torch.allclose(plan.merge(short, weight.expand(1, 2, -1)), long_plan.merge(whole), atol=1e-6)
    mixer = HTTM(log_bias=True).mixer("sdpa")
    assert torch.allclose(mixer.key_bias(plan, weight.expand(1, 2, -1)), long_plan.log_counts, atol=1e-6)
    mean = HTTM().mixer("sdpa").key_bias(plan, weight.expand(1, 2, -1))
    assert torch.allclose(mean.exp(), long_plan.counts / plan.counts, atol=1e-5)
