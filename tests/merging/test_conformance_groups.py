"""What every merging method reads, and the plans that it makes; which tokens share a group is a rule of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merging_scenes import Scene

from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.merging import AttentionMerging
from geoaccel.plan import MergePlan


def test_what_the_backbone_left_is_read_before_the_first_block(mixing: AttentionMerging) -> None:
    """Photographs and the encoder's tokens are let go then; no layer may need them."""
    scene = Scene(3, (5, 7))
    mixers = mixing.mixers("sdpa", 2)
    for index, mixer in enumerate(mixers):
        context = AttentionContext("global", index, scene.layout, state=scene.state)
        mixer.prepare(scene.heads, scene.head_dim, scene.x.device, context)
    scene.state.release()
    for index, mixer in enumerate(mixers):
        mixer(scene.q, scene.k, scene.v, scene.x, AttentionContext("global", index, scene.layout, state=scene.state))
        assert mixer.effect is not None
        assert mixer.effect.bypassed is None


def test_plans_are_partitions(mixing: AttentionMerging, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[MergePlan] = []
    init = MergePlan.__init__

    def record(self: MergePlan, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        plans.append(self)

    monkeypatch.setattr(MergePlan, "__init__", record)
    Scene(3, (5, 7), 2).through(mixing.mixers("sdpa", 1)[0])
    assert plans or mixing.name in ("asymmetric", "avggt")  # which merge no tokens
    for plan in plans:
        assert plan.group_of.min() >= 0
        assert plan.group_of.max() < plan.num_groups
        assert int(plan.counts.sum()) == plan.group_of.numel()
        for row, length in zip(plan.counts.flatten(0, -2), plan.lengths.flatten(), strict=True):
            assert (row[:length] > 0).all()
            assert (row[length:] == 0).all()


def test_scenes_of_a_batch_do_not_see_each_other(mixing: AttentionMerging, echo: list[int]) -> None:
    out = Scene(3, (5, 7), 2).through(mixing.mixers("echo", 1)[0])
    both = Scene(3, (5, 7), 2)
    both.q[1] = torch.randn(both.q[1].shape)
    both.k[1] = torch.randn(both.k[1].shape)
    both.x[1] = torch.randn(both.x[1].shape)
    given = Scene(3, (5, 7), 2).state
    assert given.images is not None
    assert given.patches is not None
    both.state = ForwardState(given.images.flip(0).roll(1, 2), given.patches.flip(0))
    both.state.images[0], both.state.patches[0] = given.images[0], given.patches[0]  # type: ignore[index]
    assert torch.equal(both.through(mixing.mixers("echo", 1)[0])[0], out[0])
