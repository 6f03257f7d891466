"""Which tokens every merging method puts together, seen from outside.

Mixers are called with a kernel that answers its queries, which shows after the restore, token by token, which group
each token is in and what stood for it. Packers are asked for the rows that they make.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import run
from merging_scenes import Scene, groups_of, photographs
from torch import nn

import geoaccel
from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.layout import Packing
from geoaccel.merging import AttentionMerging, SpanMerging
from geoaccel.plan import MergePlan

SCENES = [(2, (4, 6), 1), (3, (5, 7), 1), (3, (7, 4), 2), (5, (3, 3), 1)]


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_every_query_is_answered_by_the_mean_of_its_group(
    mixing: AttentionMerging, echo: list[int], frames: int, grid: tuple[int, int], batch: int
) -> None:
    """So groups are a partition, merging takes means and unmerging finds its way back; and the effect counts right."""
    scene = Scene(frames, grid, batch)
    mixers = mixing.mixers("echo", 3)
    for index, mixer in enumerate(mixers):
        out = scene.through(mixer, index)
        assert out.shape == scene.q.shape
        counted = 0
        for b in range(batch):
            for head in range(scene.heads):
                groups = groups_of(out[b, head])
                counted += len(groups)
                for members in groups:
                    mean = scene.q[b, head, members].mean(0)
                    assert torch.allclose(out[b, head, members[0]], mean, atol=1e-5)
        effect = mixer.effect
        assert effect is not None
        assert effect.tokens == scene.layout.tokens_per_scene
        assert effect.queries == pytest.approx(counted / batch / scene.heads)
        assert effect.effective_ratio == pytest.approx(1 - counted / batch / scene.heads / effect.tokens)
        assert effect.keys <= max(echo)
        assert effect.keys < effect.tokens


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_no_two_special_tokens_share_a_group(
    mixing: AttentionMerging, echo: list[int], frames: int, grid: tuple[int, int], batch: int
) -> None:
    """Camera and register tokens survive: alone, or as the destination of patches."""
    scene = Scene(frames, grid, batch)
    out = scene.through(mixing.mixers("echo", 1)[0])[:, :, scene.special]
    for row in out.flatten(0, 1):
        assert len(row.unique(dim=0)) == len(row)


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_a_constant_comes_back(mixing: AttentionMerging, frames: int, grid: tuple[int, int], batch: int) -> None:
    """Whatever is attended to: no empty group is seen as a key, nothing is lost or doubled on the way back."""
    scene = Scene(frames, grid, batch)
    scene.v = torch.full_like(scene.v, 0.7)
    for index, mixer in enumerate(mixing.mixers("sdpa", 3)):
        assert torch.allclose(scene.through(mixer, index), scene.v, atol=1e-5)


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
        assert mixer.effect.effective_ratio > 0


def test_plans_are_partitions(mixing: AttentionMerging, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[MergePlan] = []
    init = MergePlan.__init__

    def record(self: MergePlan, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        plans.append(self)

    monkeypatch.setattr(MergePlan, "__init__", record)
    Scene(3, (5, 7), 2).through(mixing.mixers("sdpa", 1)[0])
    assert plans
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


@pytest.mark.parametrize(("frames", "grid"), [(1, (4, 6)), (3, (5, 7)), (2, (7, 4))])
def test_packed_rows_are_the_means_of_their_tokens(
    tiny: nn.Module, packing: SpanMerging, monkeypatch: pytest.MonkeyPatch, frames: int, grid: tuple[int, int]
) -> None:
    """Special tokens stand alone, every row stands for someone, and the weights say for how many."""
    packings: list[Packing] = []
    init = Packing.__init__

    def record(self: Packing, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        packings.append(self)

    monkeypatch.setattr(Packing, "__init__", record)
    geoaccel.accelerate(tiny, merging=packing)
    run(tiny, photographs(frames, grid))
    assert packings
    for found in packings:
        counts = found.owner.flatten().bincount(minlength=len(found.weight))
        assert torch.equal(counts, found.weight.long())
        assert (counts > 0).all()
        special = found.owner.shape[2] - grid[0] * grid[1]
        assert (found.weight[found.owner[:, :, :special]] == 1).all()
        rows = torch.randn(len(found.weight), 4)
        dense = found.unpack(rows)
        total = torch.zeros_like(rows).index_add_(0, found.owner.flatten(), dense.flatten(0, -2))
        assert torch.allclose(total / found.weight[:, None], rows, atol=1e-5)
