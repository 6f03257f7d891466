"""HTTM inside the packed rows of Co-Me."""

from __future__ import annotations

import pytest
import torch
from httm_heads import DIM, HEADS
from references import relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import AttentionContext
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.alike import Alike
from geoaccel.merging.headwise import match
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


def packed_pairs(layout: TokenLayout) -> Packing:
    """Every third patch is in one row with the next; the last five of a frame are one."""
    owner, row = [], 0
    for _ in range(layout.batch * layout.frames):
        rows = list(range(row, row + layout.num_special))
        row += layout.num_special
        for patch in range(layout.num_patches):
            joined = patch % 3 == 1 or patch > layout.num_patches - 5
            row += 0 if joined else 1
            rows.append(row - 1)
        owner.append(rows)
    shape = (layout.batch, layout.frames, layout.tokens_per_frame)
    return Packing.from_owner(torch.tensor(owner).reshape(shape), layout)


def weighted(x: Tensor, weight: Tensor, group_of: Tensor, groups: int) -> list[Tensor]:  # [N, D] -> groups of [D]
    """The mean of each group over all tokens that its rows stand for."""
    chosen = [(group_of == g).nonzero()[:, 0].tolist() for g in range(groups)]
    return [sum(weight[i] * x[i] for i in rows) / sum(weight[i] for i in rows) for rows in chosen]


@pytest.mark.parametrize("log_bias", [False, True])
def test_attention_inside_packed_rows_against_loops(log_bias: bool) -> None:
    """Queries, keys and values are means over tokens, not over rows."""
    layout = TokenLayout(2, 3, (4, 5), 2)
    packing = packed_pairs(layout)
    rows = packing.scene_lengths
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, sum(rows), DIM, generator=generator)
    method = HTTM(block=(8, 2), outliers=0, query_keep=0.4, key_keep=0.5, log_bias=log_bias, bypass=False)
    mixer = method.mixer("sdpa")
    context = AttentionContext("global", 0, layout, lengths=rows, packing=packing)
    mixed, _ = mixer(q, k, v, torch.zeros(sum(rows), HEADS * DIM), context)

    splits = mixer.splits(layout, packing, context, q.device)
    begin = 0
    for length, (for_queries, for_keys) in zip(rows, splits, strict=True):
        scene = slice(begin, begin + length)
        begin += length
        weight = packing.weight[scene].double()
        assert for_queries is not None
        assert for_keys is not None
        plans = match(q[:, :, scene], for_queries), match(k[:, :, scene], for_keys)
        for head in range(HEADS):
            (query_of, queries), (key_of, keys) = ((plan.group_of[0, head], plan.num_groups) for plan in plans)
            one = [t[0, head, scene].double() for t in (q, k, v)]
            short_q = weighted(one[0], weight, query_of, queries)
            short_k, short_v = (weighted(t, weight, key_of, keys) for t in one[1:])
            total = torch.stack([weight[key_of == g].sum() for g in range(keys)])
            counts = torch.stack([(key_of == g).sum() for g in range(keys)])
            bias = (total if log_bias else total / counts).log()
            for row in range(length):
                logits = torch.stack([short_q[query_of[row]] @ key for key in short_k]) / DIM**0.5 + bias
                expected = (logits.softmax(0)[:, None] * torch.stack(short_v)).sum(0)
                torch.testing.assert_close(mixed[0, head, scene][row].double(), expected, rtol=1e-4, atol=1e-5)
