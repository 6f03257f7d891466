"""FastVGGT: the draw of targets, the protected stride, the published code, and what it got wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from references import Golden
from torch import nn

import geoaccel
from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.layout import TokenLayout
from geoaccel.merging.fastvggt import FastVGGT, every_nth
from geoaccel.merging.partition import Partition, num_cells
from geoaccel.merging.rates import Kind
from geoaccel.merging.released import ReleasedPartition, whole_steps

LAYOUTS = [TokenLayout(1, 4, (28, 37), 5), TokenLayout(1, 3, (37, 28), 5), TokenLayout(1, 2, (5, 7), 17)]


def partition(method: FastVGGT, layout: TokenLayout) -> Partition:
    return method.partition(AttentionContext("global", layout=layout), layout, torch.device("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_the_first_frame_the_special_tokens_and_one_patch_a_cell(layout: TokenLayout) -> None:
    parts = partition(FastVGGT(), layout)
    per_frame, special = layout.tokens_per_frame, layout.num_special
    targets = torch.zeros(layout.tokens_per_scene, dtype=torch.bool)
    targets[parts.targets[0]] = True
    targets = targets.view(layout.frames, per_frame)
    assert targets[0].all()
    assert targets[1:, :special].all()
    assert (targets[1:, special:].sum(-1) == num_cells(layout.grid)).all()
    height, width = layout.grid
    padded = torch.zeros(layout.frames - 1, height + height % 2, width + width % 2)
    padded[:, :height, :width] = targets[1:, special:].view(-1, height, width)
    assert (nn.functional.avg_pool2d(padded[:, None], 2) * 4 == 1).all()


def test_merged_length_is_the_published_formula_without_the_repeats() -> None:
    """P + (S - 1) (specials + cells) targets, and every tenth token that is none of them."""
    layout = LAYOUTS[0]
    parts = partition(FastVGGT(), layout)
    tokens, per_frame = layout.tokens_per_scene, layout.tokens_per_frame
    assert parts.targets.shape[-1] == per_frame + 3 * (5 + 14 * 19)
    stride = set(range(0, tokens, 10)) - set(parts.targets[0].tolist())
    assert set(parts.protected[0].tolist()) == {token for token in stride if token < 10 * (tokens // 10)}
    released = partition(FastVGGT(released_code=True), layout)
    assert released.targets.shape[-1] == per_frame + 3 * (5 + 14 * 18)
    assert isinstance(released, ReleasedPartition)
    assert released.protected.shape[-1] + released.repeated.shape[-1] == tokens // 10


@pytest.mark.parametrize(
    ("tokens", "share", "expected"),
    [
        (20, 0.1, [0, 10]),
        (25, 0.1, [0, 10]),
        (9, 0.1, []),
        (9, 0, []),
        (10, 0.4, [0, 2, 5, 7]),
        (8, 0.75, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_protected_tokens_stand_at_equal_distances(tokens: int, share: float, expected: list[int]) -> None:
    assert every_nth(tokens, share)[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("share", [0.1, 0.15, 0.4, 0.6, 0.99])
def test_every_frame_has_its_share_of_protected_tokens(share: float) -> None:
    frames = every_nth(1000, share).view(10, 100).float().mean(-1)
    assert (frames - share).abs().max() < 0.011
    published = whole_steps(1000, share)[0].nonzero()[:, 0]
    assert published.tolist() == [index * (1000 // int(share * 1000)) for index in range(int(share * 1000))]


def test_a_large_protected_share_still_merges() -> None:
    layout = TokenLayout(1, 10, (16, 16), 5)
    method = FastVGGT(protect=0.8, bypass=False)
    parts = partition(method, layout)
    sources = layout.tokens_per_scene - parts.targets.shape[-1] - parts.protected.shape[-1]
    assert abs(method.num_sources(layout) - sources) < 0.05 * sources
    assert method.mixer("sdpa").decide(layout, Kind(torch.device("cpu"), torch.float32, 16, 8)).why is None


def test_the_draw_depends_on_the_seed_alone_and_frames_differ() -> None:
    layout = LAYOUTS[0]
    first, again, other = (partition(FastVGGT(seed=seed), layout).targets for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    per_frame = layout.tokens_per_frame
    second, third = (first[(first // per_frame) == frame] % per_frame for frame in (1, 2))
    assert not torch.equal(second, third)


def test_without_an_anchor_all_frames_are_alike() -> None:
    layout = LAYOUTS[0]
    targets = partition(FastVGGT(anchor=False), layout).targets
    counts = (targets[0] // layout.tokens_per_frame).bincount()
    assert (counts == 5 + num_cells(layout.grid)).all()


@pytest.mark.parametrize(("parity", "grid"), [("even", (28, 36)), ("odd", (28, 37))])
def test_released_code_merges_random_tokens_like_the_published_code(parity: str, grid: tuple[int, int]) -> None:
    golden = Golden("merging_released")
    layout = TokenLayout(1, 4, grid, 5)
    x = golden[f"{parity}.x"]
    mixer = FastVGGT(released_code=True, bypass=False).mixer("sdpa")
    q = x[:, None]  # one head: after the restore each query is the mean of its group
    context = AttentionContext("global", layout=layout)
    mixer.prepare(1, x.shape[-1], x.device, context)
    plan = mixer.plan(x, layout, context)
    assert plan.num_groups == golden.config[f"{parity}.fastvggt.merged_length"]
    restored = plan.unmerge(plan.merge(x))
    assert torch.allclose(restored, golden[f"{parity}.fastvggt.restored"], atol=1e-5)
    mixed, restore = mixer(q, q, q, x, context)
    assert restore is not None
    assert mixed.shape[2] == plan.num_groups
    assert mixer.effect is not None
    assert mixer.effect.queries == plan.num_groups


def test_released_code_takes_one_scene_at_a_time(tiny: nn.Module, golden: Golden) -> None:
    geoaccel.accelerate(tiny, merging=FastVGGT(released_code=True, bypass=False))
    with pytest.raises(ValueError, match="one scene, got a batch of 2"), torch.no_grad():
        tiny(golden["inputs.images"])
    with pytest.raises(ValueError, match="anchor=False"):
        FastVGGT(released_code=True, anchor=False)


class Tokens:
    """One attention of vggt-mini's size."""

    def __init__(self, frames: int, grid: tuple[int, int], batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = TokenLayout(batch, frames, grid, 5)
        shape = (batch, 6, self.layout.tokens_per_scene, 32)
        self.q, self.k, self.v = (torch.randn(shape, generator=generator) for _ in range(3))
        self.x = torch.randn(batch, shape[2], 192, generator=generator)

    def through(self, method: FastVGGT, state: ForwardState | None = None) -> Any:
        mixer = method.mixer("sdpa")
        context = AttentionContext("global", layout=self.layout, state=state or ForwardState())
        mixer.prepare(6, 32, self.x.device, context)
        mixed, restore = mixer(self.q, self.k, self.v, self.x, context)
        out = mixed.transpose(1, 2).flatten(2)
        return (out if restore is None else restore(out)), mixer.effect


def test_ratio_binds_below_what_the_partition_allows() -> None:
    tokens = Tokens(3, (7, 8))
    count = tokens.layout.tokens_per_scene
    for ratio in (0.05, 0.1, 0.3):
        _, effect = tokens.through(FastVGGT(ratio=ratio, bypass=False))
        assert effect.queries == count - int(ratio * count)
    _, most = tokens.through(FastVGGT(ratio=0.6, bypass=False))
    _, nine = tokens.through(FastVGGT(ratio=0.9, bypass=False))
    assert most.queries == nine.queries
    assert nine.effective_ratio < 0.6


def test_merging_equals_attention_written_out() -> None:
    tokens = Tokens(3, (5, 7), batch=2)
    method = FastVGGT(bypass=False)
    mixer = method.mixer("sdpa")
    context = AttentionContext("global", layout=tokens.layout)
    mixer.prepare(6, 32, tokens.x.device, context)
    plan = mixer.plan(tokens.x, tokens.layout, context)
    out, effect = tokens.through(method)
    assert effect.queries == plan.num_groups
    matrix = nn.functional.one_hot(plan.group_of, plan.num_groups).float()  # [B, N, M]
    mean = (matrix / matrix.sum(1, keepdim=True)).transpose(1, 2)[:, None]
    q, k, v = (mean @ t for t in (tokens.q, tokens.k, tokens.v))
    for log_bias in (False, True):
        logits = q @ k.transpose(-1, -2) / 32**0.5
        if log_bias:
            logits = logits + matrix.sum(1)[:, None, None].log()
        short = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out, _ = tokens.through(dataclasses.replace(method, log_bias=log_bias))
        assert torch.allclose(out, matrix @ short, atol=1e-5)


def test_a_partition_serves_all_layers_of_a_forward_and_matching_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(3, (5, 7))
    drawn = []
    draw = FastVGGT.partition
    monkeypatch.setattr(FastVGGT, "partition", lambda *args: drawn.append(1) or draw(*args))
    state = ForwardState()
    first, _ = tokens.through(FastVGGT(bypass=False), state)
    tokens.x = tokens.x.flip(1)
    second, _ = tokens.through(FastVGGT(bypass=False), state)
    assert len(drawn) == 1
    assert not torch.equal(first, second)


def test_two_settings_in_one_forward_do_not_share_their_notes() -> None:
    tokens = Tokens(3, (5, 7))
    methods = [FastVGGT(seed=seed, bypass=False) for seed in (1, 2)]
    alone = [tokens.through(method)[0] for method in methods]
    state = ForwardState()
    together = [tokens.through(method, state)[0] for method in methods]
    assert not torch.equal(*alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert state.notes.keys() == set(methods)


def test_bypass_leaves_small_scenes_dense_and_takes_large_ones() -> None:
    _, small = Tokens(2, (4, 4)).through(FastVGGT())
    assert "x predicted, below min_gain=1.15" in small.bypassed
    assert (small.effective_ratio, small.gain < 1.15) == (0, True)
    large = Tokens(8, (16, 16))
    _, effect = large.through(FastVGGT())
    assert effect.bypassed is None
    assert effect.effective_ratio > 0.5
    assert effect.gain > 1.15
    _, little = large.through(FastVGGT(ratio=0.001))
    assert little.bypassed is not None


def test_packed_and_foreign_tokens_are_refused() -> None:
    tokens = Tokens(2, (4, 4))
    mixer = FastVGGT(bypass=False).mixer("sdpa")
    for context in (
        AttentionContext("global", layout=tokens.layout, lengths=(42,)),
        AttentionContext("frame", layout=dataclasses.replace(tokens.layout, frames=3)),
        AttentionContext("global"),
    ):
        with pytest.raises(ValueError, match="fastvggt merges the dense tokens of whole scenes"):
            mixer(tokens.q, tokens.k, tokens.v, tokens.x, context)
