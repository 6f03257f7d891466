"""Asymmetric attention: which keys stay, what they weigh, and that nothing else decides."""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from merging_scenes import Scene
from torch import Tensor

from geoaccel import attention_kernels
from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.attention_kernels import KERNELS, _joined, attend_groups, sdpa
from geoaccel.errors import UserError
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.asymmetric import Asymmetric, quarters
from geoaccel.merging.key_subset import packed_subset
from geoaccel.merging.lattice import phase_step, shear
from geoaccel.models import build


def by_hand(scene: Scene, kept: list[list[int]], bias: Tensor) -> Tensor:
    """Softmax over the kept keys of each head with a bias on each, written out, in float64."""
    q, k, v = (t.double() for t in (scene.q, scene.k, scene.v))
    heads = []
    for head in range(q.shape[1]):
        own = kept[head % len(kept)]
        logits = q[:, head] @ k[:, head, own].mT / math.sqrt(q.shape[-1]) + bias
        heads.append(logits.softmax(-1) @ v[:, head, own])
    return torch.stack(heads, dim=1)


def expected_keys(scene: Scene, stride: int, anchor: bool, head: int, heads: int) -> tuple[list[int], list[int]]:
    """Tokens that stand for themselves, and sampled patches, by the definition in the docstrings."""
    layout, alone, sampled = scene.layout, [], []
    height, width = layout.grid
    stride = min(stride, height * width)
    for frame in range(layout.frames):
        start = frame * layout.tokens_per_frame
        alone += range(start, start + layout.num_special)
        patches = [(row, column) for row in range(height) for column in range(width)]
        if anchor and frame == 0:
            alone += range(start + layout.num_special, start + layout.tokens_per_frame)
            continue
        wanted = (frame * phase_step(stride) + head * stride // heads) % stride
        if heads == 1 and stride < len(patches):
            chosen = [(row, x) for row, x in patches if (x + shear(stride) * row + wanted) % stride == 0]
        else:  # by phase, then as they stand; each phase takes as many, from where its share of all begins
            patches.sort(key=lambda place: (place[1] + shear(stride) * place[0]) % stride)
            first = -wanted % stride * len(patches) // stride
            chosen = patches[first : first + max(1, len(patches) // stride)]
        sampled += [start + layout.num_special + row * width + column for row, column in chosen]
    return alone, sorted(sampled)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("log_bias", [True, False])
@pytest.mark.parametrize("stride", [2, 5, 40])
def test_every_query_sees_the_subset_and_its_weights(stride: int, log_bias: bool, anchor: bool, per_head: bool) -> None:
    scene = Scene(4, (5, 7), batch=2)
    mixer = Asymmetric(stride=stride, anchor=anchor, log_bias=log_bias, per_head=per_head, bypass=False).mixer("sdpa")
    heads = scene.q.shape[1] if per_head else 1
    kept = [expected_keys(scene, stride, anchor, head, heads) for head in range(heads)]
    alone, sampled = (len(part) for part in kept[0])
    bias = torch.zeros(alone + sampled, dtype=torch.float64)
    if log_bias:
        bias[alone:] = math.log((scene.layout.tokens_per_scene - alone) / max(1, sampled))
    wanted = by_hand(scene, [own + rest for own, rest in kept], bias)
    torch.testing.assert_close(scene.through(mixer).double(), wanted, rtol=1e-4, atol=1e-5)
    assert mixer.effect is not None
    assert (mixer.effect.queries, mixer.effect.keys) == (scene.layout.tokens_per_scene, alone + sampled)
    counted = mixer.method.keys_of(scene.layout, scene.layout.tokens_per_scene)
    assert counted == pytest.approx(alone + sampled, rel=0 if per_head else 0.05)


@pytest.mark.parametrize(("counted", "share"), [(0.75, 0.25), (3, 1.0), (64, 1.0)])
def test_sampled_keys_count_for_the_patches_of_no_more_than_so_many_frames(counted: float, share: float) -> None:
    scene = Scene(4, (5, 7), batch=2)
    mixer = Asymmetric(stride=4, counted_frames=counted, per_head=False, bypass=False).mixer("sdpa")
    own, rest = expected_keys(scene, 4, True, 0, 1)
    bias = torch.zeros(len(own) + len(rest), dtype=torch.float64)
    bias[len(own) :] = math.log(3 * 35 / len(rest) * share)
    wanted = by_hand(scene, [own + rest], bias)
    torch.testing.assert_close(scene.through(mixer).double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_keys_knob_may_be_any_kind_of_number() -> None:
    assert Asymmetric(keys=np.float32(3)).stride_for(64) == Asymmetric(keys=3).stride_for(64)


@pytest.mark.parametrize(("keys", "frames", "anchor", "stride"), [
    (8, 8, True, 1), (8, 9, True, 2), (8, 64, True, 9), (8, 64, False, 8), (40, 1000, True, 26), (3, 2, True, 1),
])  # fmt: skip
def test_the_stride_follows_from_the_budget(keys: float, frames: int, anchor: bool, stride: int) -> None:
    method = Asymmetric(keys=keys, anchor=anchor)
    assert method.stride_for(frames) == stride
    whole = 1 if anchor else 0
    assert whole + (frames - whole) / stride <= keys


def test_without_a_budget_the_stride_follows_from_the_frames() -> None:
    frames = (2, 23, 24, 32, 33, 48, 64, 94, 95, 112, 113, 128, 256, 1000)
    assert [Asymmetric().stride_for(n) for n in frames] == [1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 10, 19]
    strides = [Asymmetric().stride_for(n) for n in range(2, 1001)]
    assert strides == sorted(strides)
    assert [Asymmetric(anchor=False).stride_for(n) for n in (23, 24, 64, 128, 1000)] == [1, 2, 4, 7, 19]
    assert [Asymmetric(stride=5).stride_for(n) for n in (2, 1000)] == [5, 5]


@pytest.mark.parametrize(("knobs", "strides"), [
    ({"keys": 8}, (18, 9, 18, 72)), ({"keys": 60}, (4, 2, 4, 16)), ({}, (10, 5, 10, 40)),
    ({"keys": 8, "depth_profile": False}, (9, 9, 9, 9)),
    ({"stride": 5}, (5, 5, 5, 5)), ({"keys": 70}, (1, 1, 1, 1)),
])  # fmt: skip
def test_the_stride_differs_by_quarters_of_the_layers(knobs: dict[str, Any], strides: tuple[int, ...]) -> None:
    method, layout = Asymmetric(**knobs, bypass=False), TokenLayout(1, 64, (12, 12), 5)
    assert tuple(method.stride_for(64, quarter) for quarter in range(4)) == strides
    mixers = method.mixers("sdpa", 12)
    assert [mixer.quarter for mixer in mixers] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3  # type: ignore[attr-defined]
    each = [method.keys_of(layout, layout.tokens_per_scene, quarter) for quarter in range(4)]
    assert method.mean_keys(layout, layout.tokens_per_scene, 12) == pytest.approx(sum(each) / 4)
    assert max(each) == each[1] == method.keys_of(layout, layout.tokens_per_scene)


def test_every_key_of_few_frames_stays_and_of_some_more_those_of_the_layers_that_need_them() -> None:
    method, uniform = Asymmetric(), Asymmetric(depth_profile=False)
    assert [method.keeps_all(n) for n in (1, 8, 9, 23, 24)] == [True, True, False, False, False]
    assert [uniform.keeps_all(n) for n in (8, 9, 23, 24)] == [True, True, True, False]
    assert [Asymmetric(keys=20).keeps_all(n) for n in (20, 21)] == [True, False]
    assert [Asymmetric(stride=stride).keeps_all(2) for stride in (1, 2)] == [True, False]
    assert [[method.stride_for(n, quarter) for quarter in range(4)] for n in (8, 9)] == [[1, 1, 1, 1], [3, 1, 4, 8]]
    scene = Scene(9, (4, 6))
    kept = []
    for mixer in Asymmetric(bypass=False).mixers("sdpa", 4):
        mixed = scene.through(mixer)
        assert mixer.effect is not None
        assert mixer.effect.bypassed is None
        kept.append(mixer.effect.keys / mixer.effect.queries)
        if kept[-1] == 1:
            assert torch.equal(mixed, attention_kernels.attend(scene.q, scene.k, scene.v))
    assert kept[1] == 1
    assert kept[3] < kept[2] < kept[0] < 0.7


def test_layers_that_do_not_divide_by_four_are_in_the_quarter_of_their_middle() -> None:
    assert [quarters(depth) for depth in (1, 2, 3, 7)] == [[1], [0, 2], [0, 1, 3], [0, 0, 1, 1, 2, 3, 3]]
    assert [quarters(18).count(quarter) for quarter in range(4)] == [5, 4, 5, 4]


def test_all_layers_act_or_none_and_each_takes_its_own_keys() -> None:
    scene = Scene(20, (12, 12))
    for bypass in (False, True):
        method = Asymmetric(keys=8) if bypass else Asymmetric(keys=8, bypass=False)
        mixers = method.mixers("sdpa", 4)
        for mixer in mixers:
            scene.through(mixer)
        effects = [mixer.effect for mixer in mixers]
        assert len({effect and effect.gain for effect in effects}) == 1
        keys = [effect.keys for effect in effects if effect is not None and effect.bypassed is None]
        layout = scene.layout
        expected = [method.keys_of(layout, layout.tokens_per_scene, quarter) for quarter in range(4)]
        assert keys in ([], expected)
        assert bypass or keys


def test_each_quarter_of_packed_rows_has_its_own_stride() -> None:
    scene, packing = packed()
    _, second, _, last = Asymmetric(keys=2, bypass=False).mixers("sdpa", 4)
    rows, forward = [], ForwardState()
    for mixer in (second, last):
        packed_through(scene, packing, mixer, forward)
        assert mixer.effect is not None
        rows.append(mixer.effect.keys)
    expected = []
    for stride in (2, 16):
        frames = packing.frame_lengths
        per_scene = (frames[:3], frames[3:])
        expected.append(sum(len(packed_subset(own, scene.layout.num_special, stride, True)[0]) for own in per_scene))
    assert rows == expected


@pytest.mark.parametrize(
    ("frames", "stride", "why"), [(3, None, "every key of so few frames is kept"), (1, 4, "one frame")]
)
def test_few_frames_stay_dense_bit_for_bit(frames: int, stride: int | None, why: str) -> None:
    scene = Scene(frames, (5, 7))
    mixer = Asymmetric(stride=stride, bypass=False).mixer("sdpa")
    assert torch.equal(
        scene.through(mixer), torch.nn.functional.scaled_dot_product_attention(scene.q, scene.k, scene.v)
    )
    assert mixer.effect is not None
    assert mixer.effect.bypassed == why


@pytest.mark.parametrize("weigh_keys", [True, False])
@pytest.mark.parametrize(("anchor", "log_bias"), [(True, True), (True, False), (False, True)])
def test_packed_rows_bring_their_own_weights(anchor: bool, log_bias: bool, weigh_keys: bool) -> None:
    scene, packing = packed(weigh_keys)
    layout, rows = scene.layout, packing.scene_lengths
    assert rows[0] != rows[1]
    mixer = Asymmetric(stride=3, anchor=anchor, log_bias=log_bias, bypass=False).mixer("sdpa")
    mixed = packed_through(scene, packing, mixer)
    start = keys = 0
    for number, length in enumerate(rows):
        frames = packing.frame_lengths[number * layout.frames : (number + 1) * layout.frames]
        index, sampled = packed_subset(frames, layout.num_special, 3, anchor)
        alone = index[: len(index) - sampled]
        assert len(set(index)) == len(index)
        each = (length - len(alone)) / sampled if log_bias else 1.0
        own = {row: float(packing.weight[start + row]) if weigh_keys else 1.0 for row in index}
        weight = [own[row] * (each if row in index[len(alone) :] else 1.0) for row in index]
        part = copy(scene)
        part.q, part.k, part.v = (t[:, :, start : start + length] for t in (scene.q, scene.k, scene.v))
        found = mixed[:, :, start : start + length].double()
        torch.testing.assert_close(
            found, by_hand(part, [list(index)], torch.tensor(weight).double().log()), rtol=1e-4, atol=1e-5
        )
        start, keys = start + length, keys + len(index)
    assert mixer.effect is not None
    assert (mixer.effect.tokens, mixer.effect.queries, mixer.effect.keys) == (sum(rows), sum(rows), keys)


def packed(weigh_keys: bool = True) -> tuple[Scene, Packing]:
    """Two scenes as rows: the first two patches of every frame share a row, in the second scene the first three."""
    scene = Scene(3, (4, 6), batch=2)
    layout = scene.layout
    kept = [list(range(layout.tokens_per_frame - 1)), list(range(layout.tokens_per_frame - 2))]
    owner, start = torch.empty(2, layout.frames, layout.tokens_per_frame, dtype=torch.long), 0
    for number, frame in ((b, s) for b in range(2) for s in range(layout.frames)):
        shared = [layout.num_special] * (2 + number)
        rest = range(layout.num_special + 1, len(kept[number]))
        owner[number, frame] = torch.tensor([*range(layout.num_special), *shared, *rest]) + start
        start += len(kept[number])
    packing = Packing.from_owner(owner, layout, weigh_keys=weigh_keys)
    scene.q, scene.k, scene.v = (t.transpose(0, 1).flatten(1, 2)[None, :, :start] for t in (scene.q, scene.k, scene.v))
    scene.x = scene.x.flatten(0, 1)[None, :start]
    return scene, packing


def packed_through(scene: Scene, packing: Packing, mixer: Any, forward: ForwardState | None = None) -> Tensor:
    context = AttentionContext(
        "global", 0, scene.layout, lengths=packing.scene_lengths, log_weight=packing.log_weight, packing=packing
    )
    context.state = forward or context.state
    mixed, restore = mixer(scene.q, scene.k, scene.v, scene.x, context)
    assert restore is None
    return mixed


def test_the_kernel_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        calls.append("spy")
        return sdpa(q, k, v, bias)

    monkeypatch.setitem(KERNELS._entries, "spy", spy)
    monkeypatch.setattr(attention_kernels, "sdpa", None)
    monkeypatch.setitem(KERNELS._entries, "sdpa", None)
    for method in (Asymmetric(stride=2, bypass=False), Asymmetric(stride=2, log_bias=False, bypass=False)):
        Scene(3, (4, 6)).through(method.mixer("spy"))
    scene, packing = packed()
    packed_through(scene, packing, Asymmetric(stride=2, bypass=False).mixer("spy"))
    assert len(calls) == 4  # of the packed rows each scene is a call


def test_tokens_that_are_no_whole_scenes_are_refused() -> None:
    scene = Scene(3, (4, 6))
    layout = scene.layout
    half = scene.q[:, :, :20]
    mixer = Asymmetric(stride=2, bypass=False).mixer("sdpa")
    wrong = [
        (scene.q, AttentionContext("frame", 0, layout)),
        (half, AttentionContext("global", 0, layout)),
        (scene.q, AttentionContext("global", 0, None)),
        (scene.q, AttentionContext("global", 0, layout, lengths=(layout.tokens_per_scene,))),
    ]
    for q, context in wrong:
        with pytest.raises(UserError, match="needs the tokens of whole scenes"):
            mixer(q, q, q, scene.x[:, : q.shape[2]], context)


@pytest.mark.parametrize("sampled", [0, 14])
def test_flash_attention_takes_groups(sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(2, (4, 4))
    q, k, v = scene.q, scene.k, scene.v
    groups = ((k.shape[2] - sampled, 0.0), (sampled, math.log(3.0)))
    wanted = attend_groups(q, k, v, groups)
    calls: list[int] = []

    def counted(q: Tensor, keys: Any, values: Any, biases: Any) -> Tensor:
        assert all(part.shape[2] for part in keys)  # a kernel may not take a group of no keys
        calls.append(len(keys))
        return _joined(q, keys, values, biases)

    monkeypatch.setattr(attention_kernels, "_joined", counted)
    monkeypatch.setattr(attention_kernels, "_flash_takes", lambda *given: True)
    monkeypatch.setattr(attention_kernels, "joined", lambda q, k, v, bias: pytest.fail("it waits for the device"))
    torch.testing.assert_close(attend_groups(q, k, v, groups), wanted, rtol=1e-4, atol=1e-5)
    assert calls == [2 if sampled else 1]


def test_groups_of_keys_are_joined_as_one_softmax_with_a_bias() -> None:
    scene = Scene(2, (4, 4))
    q, k, v = scene.q, scene.k, scene.v
    groups = ((10, 0.0), (9, math.log(3.0)), (k.shape[2] - 19, math.log(5.0)))
    counts = [count for count, _ in groups]
    joined = _joined(q, k.split(counts, dim=2), v.split(counts, dim=2), [value for _, value in groups])
    torch.testing.assert_close(joined, attend_groups(q, k, v, groups), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knobs", [
    {"keys": 1}, {"keys": 0, "anchor": False}, {"keys": math.inf}, {"keys": "8"}, {"keys": True},
    {"keys": True, "anchor": False}, {"keys": 8, "stride": 2}, {"stride": 0}, {"stride": 2.5},
    {"counted_frames": 0}, {"counted_frames": True}, {"counted_frames": 64, "log_bias": False},
    {"stride": True}, {"stride": 2, "depth_profile": False}, {"anchor": "no"}, {"depth_profile": 2}, {"per_head": 1},
])  # fmt: skip
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="asymmetric: "):
        Asymmetric(**knobs)


def test_a_budget_beside_a_stride_is_refused() -> None:
    with pytest.raises(UserError, match="keys=4 and stride=2 both set the keys; leave one out"):
        Asymmetric(keys=4, stride=2)


def test_what_vggt_saves_at_a_thousand_frames() -> None:
    """As docs/methods/asymmetric.md says, in FLOPs without the heads."""
    with torch.device("meta"):
        trunk = build("vggt").trunk
    cost = trunk.cost(1000, (392, 518))

    def fewer(method: Asymmetric | None) -> float:
        layout = TokenLayout(1, 1000, (28, 37), trunk.special)
        tokens = layout.tokens_per_scene
        keys = 0.0 if method is None else method.mean_keys(layout, tokens, 24)
        return sum(cost.parts.values()) / sum(cost.merged(1.0, keys / tokens).parts.values())

    assert fewer(Asymmetric()) == pytest.approx(19.3, abs=0.05)
    assert fewer(Asymmetric(keys=40)) == pytest.approx(22.7, abs=0.05)
    assert fewer(None) == pytest.approx(52, abs=0.5)
