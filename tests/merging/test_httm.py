"""HTTM: blocks, matching and the outlier filter against the paper's steps written out in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from httm_heads import DIM, HEADS, mix, random_heads
from merging_scenes import Scene
from references import relative_error
from torch import Tensor, nn

from geoaccel.attention_kernels import KERNELS, attend_heads, sdpa
from geoaccel.cost import Trunk
from geoaccel.layout import TokenLayout
from geoaccel.merging.gain import Setting
from geoaccel.merging.headwise import attend_ragged, split_outliers
from geoaccel.merging.httm import BLOCKS, HTTM
from geoaccel.merging.temporal import Places, Split, num_blocks
from geoaccel.plan import MergePlan

LAYOUTS = [TokenLayout(1, 3, (5, 7), 3), TokenLayout(2, 5, (4, 6), 5), TokenLayout(1, 7, (7, 4), 1)]


# ------------------------------------------------------------------------------------ the paper's steps in loops


def block_of(layout: TokenLayout, size: tuple[int, int], token: int) -> tuple[int, int] | None:
    """Group of frames and run of patches of a token; None for special ones."""
    frame, place = divmod(token, layout.tokens_per_frame)
    patch = place - layout.num_special
    if patch < 0:
        return None
    runs, groups = max(1, round(layout.num_patches / size[0])), math.ceil(layout.frames / size[1])
    return frame * groups // layout.frames, patch * runs // layout.num_patches


def groups_by_hand(
    x: Tensor,  # [T, D], one head
    layout: TokenLayout,
    size: tuple[int, int],
    targets: set[int],
) -> dict[int, list[int]]:
    """Target to the tokens that it stands for: each source goes to the most similar target of its block."""
    members = {t: [t] for t in sorted(targets)}
    for token in range(len(x)):
        if token in targets:
            continue
        block = block_of(layout, size, token)
        rivals = [t for t in sorted(targets) if block_of(layout, size, t) == block and block is not None]
        cosine = [float(torch.cosine_similarity(x[token], x[t], dim=0)) for t in rivals]
        members[rivals[max(range(len(rivals)), key=cosine.__getitem__)]].append(token)
    return members


def httm_by_hand(
    method: HTTM, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, targets: tuple[set[int], set[int]], count: int
) -> tuple[Tensor, list[int]]:
    """One scene; ``count`` outliers from all heads together. Gives answers [A, T, D] and queries of each head."""
    queries = [groups_by_hand(q[a], layout, method.block_size, targets[0]) for a in range(HEADS)]
    distances = []
    for a, groups in enumerate(queries):
        for members in groups.values():
            mean = q[a, members].mean(0)
            far = [(float((q[a, m] - mean).square().sum()), a, m) for m in members]
            nearest = min(far, key=lambda entry: (entry[0], -entry[2]))  # of equal ones the last stays
            distances += [entry for entry in far if entry != nearest]
    chosen = {(a, m) for _, a, m in sorted(distances, key=lambda entry: (-entry[0], entry[1], entry[2]))[:count]}
    answers, lengths = torch.empty_like(q), []
    for a, groups in enumerate(queries):
        keys = groups_by_hand(k[a], layout, method.block_size, targets[1])
        short_k, short_v = (torch.stack([x[a, members].mean(0) for members in keys.values()]) for x in (k, v))
        rows = [[m for m in members if (a, m) not in chosen] for members in groups.values()]
        rows += [[m] for b, m in sorted(chosen) if b == a]
        lengths.append(len(rows))
        for members in rows:
            logits = short_k @ q[a, members].mean(0) / math.sqrt(DIM)
            answers[a, members] = logits.softmax(0) @ short_v
    return answers, lengths


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("anchor", [False, True])
def test_answers_are_those_of_the_steps_in_loops(layout: TokenLayout, anchor: bool) -> None:
    method = HTTM(block=(12, 2), anchor=anchor, bypass=False)
    q, k, v = random_heads(layout)
    places = Places.dense(layout, torch.device("cpu"))
    splits = [Split.of(places, (12, 2), share, anchor=anchor) for share in (0.1, 0.3)]
    sources = [set(s.sources.flatten()[s.columns].tolist()) for s in splits]
    targets = tuple(set(range(layout.tokens_per_scene)) - s for s in sources)
    first = splits[0]
    wanted = first.fixed * HEADS + round(0.2 * HEADS * first.free)
    mixed, effect = mix(method, layout, q, k, v)
    lengths = []
    for b in range(layout.batch):
        expected, own = httm_by_hand(method, layout, q[b], k[b], v[b], targets, wanted - HEADS * first.num_groups)
        assert relative_error(mixed[b], expected) < 1e-5
        lengths += own
        assert sum(own) == wanted
        assert len(set(own)) > 1, "one budget for all heads gives them different numbers"
    assert effect.queries == pytest.approx(sum(lengths) / len(lengths))
    assert effect.keys == splits[1].num_groups


# ---------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("layout", [*LAYOUTS, TokenLayout(1, 100, (3, 3), 2), TokenLayout(1, 9, (16, 16), 5)])
@pytest.mark.parametrize("size", [(12, 2), (5, 3), *BLOCKS.values()])
@pytest.mark.parametrize("anchor", [False, True])
def test_blocks_are_near_equal_and_every_one_has_its_share(
    layout: TokenLayout, size: tuple[int, int], anchor: bool
) -> None:
    places = Places.dense(layout, torch.device("cpu"))
    split = Split.of(places, size, 0.3, anchor=anchor)
    sources, targets = split.sources.flatten()[split.columns].tolist(), split.targets
    assert len(set(sources)) == len(sources) == layout.tokens_per_scene - split.num_groups
    blocks: dict[Any, list[int]] = {}
    for token in range(layout.tokens_per_scene):
        blocks.setdefault(block_of(layout, size, token), []).append(token)
    special = blocks.pop(None)
    assert not set(special) & (set(sources) | set(targets.flatten().tolist()))
    runs, groups = num_blocks(layout, *size)
    assert len(blocks) == runs * groups
    sizes = [len(members) for members in blocks.values()]
    assert max(sizes) - min(sizes) <= -(-layout.num_patches // runs) + -(-layout.frames // groups)
    for row, columns in zip(targets, split.sources, strict=True):
        # What stands in a row belongs together, whatever was repeated to fill it.
        (block,) = {block_of(layout, size, t) for t in (*row.tolist(), *(set(columns.tolist()) & set(sources)))}
        members = blocks[block]
        first = [t for t in members if anchor and t < layout.tokens_per_frame]
        expected = max(1, len(first) + round(0.3 * (len(members) - len(first))))
        assert abs(len(set(row.tolist())) - expected) <= 1
        assert set(first) <= set(row.tolist())
    for number in (split.number[t] for t in set(range(layout.tokens_per_scene)) - set(sources)):
        assert 0 <= number < split.num_groups


def test_every_block_has_a_target_however_small_the_share() -> None:
    layout = TokenLayout(1, 4, (4, 6), 5)
    split = Split.of(Places.dense(layout, torch.device("cpu")), (6, 1), 0.01)
    assert math.prod(num_blocks(layout, 6, 1)) == 16
    assert split.num_groups == 4 * 5 + 16
    assert split.targets.unique().numel() == 16
    assert not set(split.targets.flatten().tolist()) & set(split.sources.flatten().tolist())


def test_targets_are_spread_evenly_and_differ_between_frames() -> None:
    layout = TokenLayout(1, 4, (16, 16), 5)
    split = Split.of(Places.dense(layout, torch.device("cpu")), (256, 4), 0.1)
    patches = [set((row - 5).tolist()) for row in split.targets.flatten().view(1, -1) % layout.tokens_per_frame]
    frames = split.targets.flatten() // layout.tokens_per_frame
    assert frames.bincount().min() >= 20  # of 102 over four frames
    quarter = [sum(1 for p in patches[0] if p // 16 // 8 == y and p % 16 // 8 == x) for y in (0, 1) for x in (0, 1)]
    assert min(quarter) > 0.7 * max(quarter)
    by_frame = [set((split.targets.flatten()[frames == f] % layout.tokens_per_frame).tolist()) for f in range(4)]
    assert all(len(a & b) < 0.2 * len(a) for i, a in enumerate(by_frame) for b in by_frame[:i])


# ------------------------------------------------------------------------------------------------- outlier filter


def test_the_filter_takes_the_farthest_of_all_heads_and_means_follow() -> None:
    scale = torch.tensor([0.5, 0.8, 1.2])[:, None, None]
    q = scale * torch.randn(1, HEADS, 114, DIM, generator=torch.Generator().manual_seed(0))
    plan = MergePlan(torch.arange(114).expand(1, HEADS, -1) % 7, 7)
    merged = plan.merge(q)
    distance = (q - plan.unmerge(merged)).square().sum(-1)
    for shared in (True, False):
        after, lengths = split_outliers(q, plan, merged, 30, shared=shared)
        assert lengths == after.lengths.flatten().tolist()
        alone = after.group_of >= 7
        assert int(alone.sum()) == 30
        per_head = alone.sum(-1)[0].tolist()
        assert (max(per_head) > min(per_head)) == shared
        if shared:
            assert per_head[2] > per_head[1] > per_head[0]  # as their tokens scatter
        stays = distance.masked_fill(alone, -1)
        nearest = torch.full((1, HEADS, 7), torch.inf).scatter_reduce(2, plan.group_of, distance, "amin")
        rivals = stays.masked_fill(torch.isin(stays, nearest), -1)
        for head in (slice(None),) if shared else range(HEADS):
            assert distance[0, head][alone[0, head]].min() >= rivals[0, head].max()
        # Taking tokens out of a sum and counting down is the mean of those that stay.
        for group in range(7):
            members = (after.group_of[0, 2] == group).nonzero()[:, 0]
            assert torch.allclose(after.merge(q)[0, 2, group], q[0, 2, members].mean(0), atol=1e-6)


def test_no_group_is_emptied_by_the_filter() -> None:
    q, _, _ = random_heads(LAYOUTS[0])
    tokens = q.shape[2]
    plan = MergePlan(torch.arange(tokens).expand(1, HEADS, -1) % 7, 7)
    after, _ = split_outliers(q, plan, plan.merge(q), 10**6, shared=True)
    assert torch.equal(after.counts, torch.ones_like(after.counts))
    assert after.num_groups == tokens


def test_equal_tokens_have_no_outliers_to_prefer() -> None:
    """All distances are 0: the first count, and it is the same every time."""
    x = torch.ones(1, 2, 12, 4)
    plan = MergePlan(torch.zeros(1, 2, 12, dtype=torch.long), 1)
    after, _ = split_outliers(x, plan, plan.merge(x), 5, shared=True)
    assert (after.group_of > 0).nonzero()[:, 1:].tolist() == [[0, i] for i in range(5)]
    layout = TokenLayout(1, 3, (5, 7), 3)
    same = torch.ones(1, HEADS, layout.tokens_per_scene, DIM)
    v = random_heads(layout)[2]
    mixed, _ = mix(HTTM(bypass=False), layout, same, random_heads(layout)[1], v)
    assert torch.allclose(mixed, mixed[:, :, :1].expand_as(mixed), atol=1e-6)


def test_ragged_heads_are_attended_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (9, 6, 6))
    bias = torch.randn(2, 3, 6, generator=generator)
    lengths = [9, 2, 5, 1, 9, 4]
    for key_bias in (None, bias):
        out = attend_ragged(q, k, v, lengths, key_bias, "sdpa")
        if key_bias is not None:
            at_once = attend_heads(q, k, v, key_bias)
            full = attend_ragged(q, k, v, [9] * 6, key_bias, "sdpa")
            assert torch.allclose(at_once, full, atol=1e-6)
        for row, length in enumerate(lengths):
            b, a = divmod(row, 3)
            logits = q[b, a] @ k[b, a].T / math.sqrt(8) + (0 if key_bias is None else key_bias[b, a])
            assert torch.allclose(out[b, a, :length], (logits.softmax(-1) @ v[b, a])[:length], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize("layout", [TokenLayout(1, 8, (16, 16), 5)])
def test_shares_are_those_of_the_paper(layout: TokenLayout) -> None:
    _, effect = mix(HTTM(anchor=False, bypass=False), layout, *random_heads(layout))
    patches, special = 8 * 256, 8 * 5
    assert effect.queries == pytest.approx(special + 0.2 * patches, abs=1)
    assert effect.keys == pytest.approx(special + 0.3 * patches, abs=1)
    _, anchored = mix(HTTM(bypass=False), layout, *random_heads(layout))
    assert anchored.queries == pytest.approx(special + 256 + 0.2 * (patches - 256), abs=1)


def test_one_ratio_stands_for_three_knobs() -> None:
    assert replace(HTTM(), query_keep=0.2) == HTTM()
    paper = HTTM(ratio=0.8)
    assert (paper.query_keep, paper.key_keep, paper.outliers) == (0.2, pytest.approx(0.3), 0.1)
    assert HTTM(ratio=0.5).query_keep == 0.5
    assert HTTM(ratio=0.9).outliers == pytest.approx(0.05)
    assert HTTM(ratio=0).query_keep == HTTM(ratio=0).key_keep == 1


def test_without_outliers_the_length_is_the_same() -> None:
    layout = TokenLayout(1, 8, (8, 8), 5)
    qkv = random_heads(layout)
    with_filter, without = (mix(HTTM(outliers=d, bypass=False), layout, *qkv) for d in (0.1, 0.0))
    assert with_filter[1].queries == pytest.approx(without[1].queries, rel=0.03)
    assert not torch.allclose(with_filter[0], without[0], atol=1e-3)


def test_log_bias_weighs_keys_by_their_tokens() -> None:
    """With one value for each key, attention with counts is attention to every token."""
    layout = TokenLayout(1, 3, (5, 7), 3)
    q, k, v = random_heads(layout)
    method = HTTM(query_keep=1, outliers=0, key_keep=0.3, log_bias=True, block=(35, 3), bypass=False)
    split = Split.of(Places.dense(layout, torch.device("cpu")), (35, 3), 0.3, anchor=True)
    targets = set(range(layout.tokens_per_scene)) - set(split.sources.flatten()[split.columns].tolist())
    for a in range(HEADS):
        for tokens in groups_by_hand(k[0, a], layout, (35, 3), targets).values():
            k[0, a, tokens] = k[0, a, tokens].mean(0)
            v[0, a, tokens] = v[0, a, tokens].mean(0)
    mixed, effect = mix(method, layout, q, k, v)
    assert effect.keys < layout.tokens_per_scene
    assert relative_error(mixed, nn.functional.scaled_dot_product_attention(q, k, v)) < 1e-5
    plain, _ = mix(replace(method, log_bias=False), layout, q, k, v)
    assert relative_error(plain, mixed) > 1e-3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"query_keep": 0}, r"query_keep=0 is not in \(0, 1\]"),
        ({"outliers": 0.2}, "outliers=0.2 leaves no targets within query_keep=0.2"),
        ({"block": (0, 4)}, r"block=\(0, 4\) must be"),
        ({"block": (4,)}, "spatial-first"),
        ({"block": "time-first"}, "unknown block 'time-first'.*temporal-first"),
        ({"ratio": 1.0}, r"ratio=1.0 is not in \[0, 1\)"),
    ],
)
def test_wrong_knobs_are_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HTTM(**knobs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [(2, 2), (1, 4), (4, 1), (1, 1)])
def test_blocks_with_more_targets_than_may_stay_take_no_outliers_out(block: tuple[int, int]) -> None:
    scene = Scene(frames=12, grid=(7, 7))
    mixer = HTTM(block=block, bypass=False).mixer("sdpa")
    assert scene.through(mixer).isfinite().all()
    assert mixer.effect is not None
    assert mixer.effect.queries < scene.layout.tokens_per_scene or block == (1, 1)


MINI = Setting(Trunk(192, 14, 3, 4, 4, 5, 5), head_work=2 * 1.2e9 / 256)


def test_few_frames_of_a_mini_stay_dense() -> None:
    """By the built-in rates; 8 frames gained 1.12 to 1.14 on one core."""
    mixer: Any = HTTM().mixer("sdpa")
    mixer.setting = MINI
    for frames, merges in ((2, False), (4, False), (8, False), (32, True), (64, True)):
        layout = TokenLayout(1, frames, (16, 16), 5)
        gain = mixer.predicted(layout, torch.empty(1, 6, layout.tokens_per_scene, 32))
        assert (HTTM().too_little(gain) is None) == merges, (frames, gain)


@pytest.mark.parametrize(("shortest", "calls"), [(8, 1), (7, 1), (4, 4)])
def test_queries_are_padded_for_one_call_where_little_is_added(
    shortest: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(q.shape)
        return sdpa(q, k, v, bias)

    monkeypatch.setitem(KERNELS._entries, "counted", counted)
    q, k, v = torch.randn(3, 1, 4, 8, 16)
    lengths = (8, 8, 8, shortest)
    mixed = attend_ragged(q, k, v, lengths, None, "counted")
    assert len(seen) == calls
    for head, length in enumerate(lengths):
        torch.testing.assert_close(mixed[:, head, :length], sdpa(q, k, v, None)[:, head, :length])
