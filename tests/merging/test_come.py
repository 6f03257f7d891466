"""Co-Me: groups, packing, the cut through both backbones."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from conftest import Golden, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.api import place_mixer
from geoaccel.attention import AttentionContext, DenseMixer, Restore
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.come import Choice, CoMe, CoMePacker, Span, group_means, lowest, num_groups, pack_groups, spread
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.stream import TokenStream

GRIDS = [(6, 9), (5, 7), (7, 4), (2, 2), (1, 5), (4, 1), (1, 1)]
THREE = (3, 3)
RANKINGS = ["most_alike", "least_confident"]  # the default, and the paper's


def layout_of(grid: tuple[int, int], *, batch: int = 2, frames: int = 3, special: int = 2) -> TokenLayout:
    return TokenLayout(batch, frames, grid, special)


def some_flags(layout: TokenLayout, group: tuple[int, int] = THREE, seed: int = 0) -> Tensor:
    shape = (layout.batch, layout.frames, *num_groups(layout.grid, group))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def tokens(layout: TokenLayout, width: int = 8, seed: int = 1) -> Tensor:
    shape = (layout.batch, layout.frames, layout.tokens_per_frame, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def come(**knobs: Any) -> CoMe:
    """Where confidence is asked for, an untrained predictor ranks as reproducibly as a trained one."""
    confident = "confident" in knobs.get("choose", "")
    return CoMe(**{**({"predictor": "untrained"} if confident else {}), "bypass": False, **knobs})


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def written_out(layout: TokenLayout, group: tuple[int, int], flags: Tensor) -> list[list[tuple[int, list[int]]]]:
    """For every frame its rows in order, each as (scene-wide frame number, dense tokens of that frame)."""
    frames = []
    rows, columns = num_groups(layout.grid, group)
    for b, s in itertools.product(range(layout.batch), range(layout.frames)):
        listing = [[i] for i in range(layout.num_special)]
        for gy, gx in itertools.product(range(rows), range(columns)):
            members = [
                layout.num_special + y * layout.grid[1] + x
                for y in range(gy * group[0], min((gy + 1) * group[0], layout.grid[0]))
                for x in range(gx * group[1], min((gx + 1) * group[1], layout.grid[1]))
            ]
            listing += [members] if flags[b, s, gy, gx] else [[member] for member in members]
        frames.append([(b * layout.frames + s, members) for members in listing])
    return frames


# ----------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [THREE, (2, 4)])
def test_rows_are_what_the_paper_lists_on_any_grid(grid: tuple[int, int], group: tuple[int, int]) -> None:
    layout = layout_of(grid)
    flags = some_flags(layout, group)
    packing = pack_groups(layout, group, flags)
    x = tokens(layout)
    dense, positions = x.flatten(0, 1), layout.positions()
    rows = [row for frame in written_out(layout, group, flags) for row in frame]
    assert packing.weight.tolist() == [len(members) for _, members in rows]
    assert packing.frame_lengths == tuple(len(frame) for frame in written_out(layout, group, flags))
    expected = torch.stack([dense[frame, members].mean(0) for frame, members in rows])
    assert relative_error(packing.pack(x), expected) < 1e-6
    middles = torch.stack([positions[members].double().mean(0) for _, members in rows])
    assert torch.allclose(packing.positions.double(), middles, atol=1e-6)
    owner = packing.owner.flatten(0, 1)
    for row, (frame, members) in enumerate(rows):
        assert owner[frame, members].tolist() == [row] * len(members)


def test_counts_add_up() -> None:
    """Frame length is s0 + n (M - k) + k, and the weights are all tokens."""
    layout = layout_of((6, 9))
    flags = some_flags(layout)
    packing = pack_groups(layout, THREE, flags)
    merged = flags.flatten(2).sum(-1).flatten().tolist()
    assert packing.frame_lengths == tuple(2 + 9 * (6 - k) + k for k in merged)
    assert packing.weight.sum() == layout.batch * layout.tokens_per_scene
    assert packing.owner.min() == 0
    assert packing.owner.max() == sum(packing.frame_lengths) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splitting_gives_unmerged_tokens_back_bit_for_bit(dtype: torch.dtype) -> None:
    layout = layout_of((5, 7))
    flags = some_flags(layout)
    packing = pack_groups(layout, THREE, flags)
    x = tokens(layout).to(dtype)
    back = packing.unpack(packing.pack(x))
    alone = packing.weight[packing.owner] == 1
    assert alone[:, :, :2].all()
    assert torch.equal(back[alone], x[alone])
    assert not torch.equal(back, x)
    assert (
        torch.equal(packing.pack(back), packing.pack(x)) or relative_error(packing.pack(back), packing.pack(x)) < 1e-2
    )


def test_middle_of_nine_patches_is_exact_on_wide_grids() -> None:
    """Means in a narrow dtype put some middles one patch off from a width of 29 on."""
    layout = layout_of((3, 39), batch=1, frames=1)
    packing = pack_groups(layout, THREE, torch.ones(1, 1, 1, 13, dtype=torch.bool))
    assert packing.positions[2:].tolist() == [[2, 2 + 3 * i] for i in range(13)]


def test_other_special_tokens_in_front_of_packed_frames() -> None:
    layout = layout_of((5, 7), special=2)
    flags = some_flags(layout)
    packing = pack_groups(layout, THREE, flags)
    for wanted in (0, 2, 5):
        expected = pack_groups(layout_of((5, 7), special=wanted), THREE, flags)
        changed = packing.with_special(2, wanted)
        assert changed.frame_lengths == expected.frame_lengths
        for name in ("owner", "positions", "weight"):
            assert torch.equal(getattr(changed, name), getattr(expected, name)), name


@pytest.mark.parametrize("variant", ["packed", "direct"])
def test_entering_the_aggregator_replaces_the_special_tokens_exactly(variant: str) -> None:
    layout = layout_of((5, 7), special=2)
    packing, x, special = pack_groups(layout, THREE, some_flags(layout)), tokens(layout), torch.randn(2, 3, 4, 8)
    stream = TokenStream(packing.pack(x) if variant == "packed" else x, layout, packing=packing)
    entered = stream.enter(special, 8, 100.0)
    dense = entered.dense()
    assert torch.equal(dense[:, :, :4], special)
    assert torch.equal(dense[:, :, 4:], stream.dense()[:, :, 2:])
    assert entered.layout.num_special == 4
    assert entered.rope is not None
    assert len(entered.rope[0]) == len(entered.packing.weight) == len(packing.weight) + 6 * 2


# ------------------------------------------------------------------------------------------------- which groups


def test_means_of_smaller_groups_at_the_edges() -> None:
    conf = torch.arange(20.0).reshape(1, 1, 4, 5)
    means = group_means(conf, THREE)[0, 0]
    expected = [[conf[0, 0, a:b, c:d].mean() for c, d in ((0, 3), (3, 5))] for a, b in ((0, 3), (3, 4))]
    assert torch.allclose(means, torch.tensor(expected))
    for grid in GRIDS:
        assert group_means(torch.ones(2, 3, *grid), THREE).shape == (2, 3, *num_groups(grid, THREE))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [THREE, (2, 4)])
def test_the_spread_is_what_merging_loses_for_each_token_saved(grid: tuple[int, int], group: tuple[int, int]) -> None:
    layout = layout_of(grid)
    x = tokens(layout)[:, :, layout.num_special :]
    found = spread(x, grid, group)
    everything = torch.ones(2, 3, *num_groups(grid, group), dtype=torch.bool)
    rows = [row for frame in written_out(layout, group, everything) for row in frame if row[1][0] >= layout.num_special]
    assert len(rows) == found.numel()
    for (frame, members), value in zip(rows, found.flatten().tolist(), strict=True):
        own = x.flatten(0, 1)[frame, [member - layout.num_special for member in members]]
        if len(own) == 1:
            assert value > 1e30, "a patch alone saves nothing"
        else:
            assert value == pytest.approx(float(own.var(0).sum()), rel=1e-4)
    again = spread(x.bfloat16(), grid, group)
    assert again.dtype == torch.float32
    several = found < 1e30
    assert torch.allclose(again[several], found[several], rtol=0.05)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_the_quantile_is_taken_over_the_scene(share: float) -> None:
    """A photograph that is sure everywhere loses nothing, one that is not loses more than its share."""
    scores = torch.randperm(2 * 3 * 20, generator=torch.Generator().manual_seed(0)).reshape(2, 3, 4, 5).float()
    scores[:, 0] += 1000
    flags = lowest(scores, share, "scene")
    count = math.ceil(share * 59)
    assert flags.sum((1, 2, 3)).tolist() == [count, count]
    assert flags[:, 0].sum() == 2 * max(0, count - 40)
    for b in range(2):
        if count:
            assert scores[b][flags[b]].max() < scores[b][~flags[b]].min()
    assert lowest(scores, share, "frame").sum((2, 3)).unique().tolist() == [math.ceil(share * 19)]


@pytest.mark.parametrize("scope", ["scene", "frame"])
@pytest.mark.parametrize("variant", ["packed", "direct"])
def test_the_first_frame_can_stay_as_it_is(scope: Any, variant: Any) -> None:
    """And the others merge as if they were alone."""
    layout, others = TokenLayout(2, 4, (4, 6), 5), TokenLayout(2, 3, (4, 6), 5)
    span = Span(layer=1, within=5, across=4, heads=1, head_dim=8)
    x = tokens(layout)
    state = {"images": torch.zeros(2, 4, 3, 8, 8)}
    anchored = CoMePacker(come(anchor=True, scope=scope, variant=variant), span, None)
    _, packing = anchored(x, layout, state)  # type: ignore[misc]
    _, alone = CoMePacker(come(scope=scope, variant=variant), span, None)(x[:, 1:], others, state)  # type: ignore[misc]
    first, length = packing.frame_lengths[::4], layout.tokens_per_frame
    assert first == (length, length)
    assert tuple(n for i, n in enumerate(packing.frame_lengths) if i % 4) == alone.frame_lengths
    assert max(alone.frame_lengths) < length
    for b in range(2):
        begin = int(packing.owner[b, 0, 0])
        assert sorted(packing.owner[b, 0].tolist()) == list(range(begin, begin + length))
        moved = packing.owner[b, 1:] - packing.owner[b, 1].min()
        assert torch.equal(moved, alone.owner[b] - alone.owner[b].min())
    assert anchored.effect.queries == sum(packing.frame_lengths) / 2  # type: ignore[union-attr]
    # One frame alone has nothing to merge.
    one = TokenLayout(1, 1, (16, 16), 5)
    assert anchored.why_dense(one, "cpu") == "the only frame is the anchor"
    assert CoMePacker(come(), span, None).why_dense(one, "cpu") is None


def test_an_anchor_that_leaves_too_little_to_merge_counts_as_such() -> None:
    """Bypassing knows that the first frame saves nothing."""
    span = Span(layer=1, within=5, across=4, heads=6, head_dim=32)
    least = {}
    for anchor in (False, True):
        packer = CoMePacker(CoMe(anchor=anchor), span, None)
        sides = (
            side for side in range(2, 40, 2) if packer.why_dense(TokenLayout(1, 2, (side, side), 5), "cpu") is None
        )
        least[anchor] = next(sides)
    assert least[False] < least[True]


def test_controls_choose_other_groups(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    answers = {}
    for choose in get_args(Choice):
        geoaccel.accelerate(tiny, merging=come(choose=choose))
        answers[choose] = (run(tiny, images), packer_of(tiny).effect)
    key = next(iter(answers["random"][0]))
    for a, b in itertools.combinations(answers, 2):
        assert not torch.equal(answers[a][0][key], answers[b][0][key])
    geoaccel.accelerate(tiny, merging=come(choose="random", seed=1))
    assert not torch.equal(run(tiny, images)[key], answers["random"][0][key])


def packer_of(model: nn.Module) -> Any:
    return next(module.token_packer for module in model.modules() if hasattr(module, "token_packer"))


# ------------------------------------------------------------------------------------------- attention and blocks


@pytest.mark.parametrize("variant", ["packed", "direct"])
@pytest.mark.parametrize("kind", ["frame", "global"])
@pytest.mark.parametrize("log_bias", [True, False])
def test_merging_equal_tokens_changes_nothing_where_keys_are_weighed(variant: str, kind: Any, log_bias: bool) -> None:
    """A group of n equal tokens is one token with log n on its logits; without the bias it is not."""
    layout = layout_of((5, 7))
    packing = pack_groups(layout, THREE, some_flags(layout), weigh_keys=log_bias)
    x = packing.unpack(packing.pack(tokens(layout, 16)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(16, 2, layer_scale=1.0)
    with torch.no_grad():
        expected = TokenStream(x, layout).through(block, kind, 0).dense()
        stream = TokenStream(packing.pack(x) if variant == "packed" else x, layout, packing=packing)
        error = relative_error(stream.through(block, kind, 0).dense(), expected)
    assert error < 1e-6 if log_bias else error > 1e-3


def test_direct_members_keep_their_own_residual() -> None:
    layout = layout_of((6, 6))
    packing = pack_groups(layout, THREE, torch.ones(2, 3, 2, 2, dtype=torch.bool))
    x = tokens(layout, 16)
    with torch.no_grad():
        after = TokenStream(x, layout, packing=packing).through(Block(16, 2, layer_scale=1.0), "global", 0).x
    update = (after - x)[:, :, 2:].unflatten(2, (6, 6))[:, :, :3, :3].flatten(2, 3)
    assert torch.allclose(update, update[:, :, :1].expand_as(update), atol=1e-5)
    assert update.abs().max() > 1e-2


class Probe(DenseMixer):
    """Notes what an attention is told."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        self.seen.append((q.shape, context))  # type: ignore[attr-defined]
        return super().__call__(q, k, v, x, context)


def test_every_attention_behind_the_tap_sees_the_packed_rows(tiny: nn.Module, golden: Golden) -> None:
    geoaccel.accelerate(tiny, merging=come())
    probes = {kind: Probe() for kind in ("encoder", "frame", "global")}
    for kind, probe in probes.items():
        place_mixer(tiny, probe, kind)
    images = golden["inputs.images"]
    run(tiny, images)
    effect = packer_of(tiny).effect
    assert 0.2 < effect.effective_ratio < 0.5
    rows = round(2 * effect.queries)
    for kind, probe in probes.items():
        calls = probe.seen  # type: ignore[attr-defined]
        for shape, context in calls[1:] if kind == "encoder" else calls:
            packing = context.packing
            assert (shape[0], shape[2]) == (1, rows)
            assert sum(context.lengths) == sum(packing.frame_lengths) == len(context.log_weight) == rows
            assert len(context.lengths) == (2 if kind == "global" else 6)
            assert torch.equal(context.log_weight.exp().round(), packing.weight)
            assert len(context.rope[0]) == rows if kind != "encoder" else context.rope is None
    before, context = probes["encoder"].seen[0]  # type: ignore[attr-defined]
    assert before[0] == 6
    assert context.packing is None


def test_flat_places_merge_first(tiny: nn.Module) -> None:
    """Half of each photograph is of one colour, the other is noise."""
    images = torch.rand(1, 2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    images[..., 56:] = 0.5
    probe = Probe()
    geoaccel.accelerate(tiny, merging=come(ratio=0.5))
    place_mixer(tiny, probe, "global")
    run(tiny, images)
    packing = probe.seen[0][1].packing  # type: ignore[attr-defined]
    merged = packing.weight[packing.owner[:, :, 5:]].unflatten(2, (8, 8)) > 1
    assert 0.3 < merged.float().mean() < 0.6
    assert merged[..., 4:].sum() > 10 * merged[..., :4].sum()


# ------------------------------------------------------------------------------------------------- whole models


def test_ratio_zero_is_the_dense_model_bit_for_bit(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=come(ratio=0))
    merged = run(tiny, images)
    assert all(torch.equal(merged[key], dense[key]) for key in dense)
    assert packer_of(tiny).effect.bypassed == "ratio 0 merges nothing"


def test_no_group_below_the_quantile_still_equals_the_dense_model(tiny: nn.Module, golden: Golden) -> None:
    """Everything runs packed, and nothing is merged."""
    images = golden["inputs.images"]
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=come(ratio=1e-9, group=(1, 2)))
    constant = packer_of(tiny)
    constant.scores = lambda patches, layout: torch.zeros(2, 3, *num_groups(layout.grid, (1, 2)))
    merged = run(tiny, images)
    assert constant.effect.effective_ratio == 0
    for key in dense:
        assert relative_error(merged[key], dense[key]) < 1e-5, key


@pytest.mark.parametrize("choose", RANKINGS)
@pytest.mark.parametrize("variant", ["packed", "direct"])
@pytest.mark.parametrize("scope", ["scene", "frame"])
def test_batch_of_two_equals_two_runs(tiny: nn.Module, golden: Golden, choose: str, variant: Any, scope: Any) -> None:
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, merging=come(choose=choose, variant=variant, scope=scope))
    both = run(tiny, images)
    for index in range(2):
        alone = run(tiny, images[index : index + 1])
        for key, value in alone.items():
            assert relative_error(both[key][index : index + 1], value) < 1e-4, key


@pytest.mark.parametrize("choose", RANKINGS)
def test_permuting_the_frames_permutes_the_answer_of_pi3(tiny: nn.Module, golden: Golden, choose: str) -> None:
    if tiny.backbone.name != "pi3":  # type: ignore[union-attr]
        pytest.skip("VGGT's first frame is its reference")
    images, order = golden["inputs.images"], [2, 0, 1]
    geoaccel.accelerate(tiny, merging=come(choose=choose))
    straight, permuted = run(tiny, images), run(tiny, images[:, order])
    for key, value in straight.items():
        assert relative_error(permuted[key], value[:, order]) < 1e-4, key


@pytest.mark.parametrize("size", [(70, 98), (112, 56), (28, 28), (14, 70)])
@pytest.mark.parametrize("choose", RANKINGS)
@pytest.mark.parametrize("variant", ["packed", "direct"])
def test_any_grid_and_one_frame(tiny: nn.Module, size: tuple[int, int], choose: str, variant: Any) -> None:
    geoaccel.accelerate(tiny, merging=come(choose=choose, variant=variant, ratio=0.9))
    images = torch.rand(1, 1, 3, *size, generator=torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() for value in run(tiny, images).values())


@pytest.mark.parametrize("choose", RANKINGS)
def test_bfloat16_and_back(tiny: nn.Module, golden: Golden, choose: str) -> None:
    """The predictor follows the model's dtype, in inference mode too; only near ties may fall differently."""
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, merging=come(choose=choose))
    wide = run(tiny, images)
    with torch.inference_mode():
        narrow = tiny.to(torch.bfloat16)(images.bfloat16())
    for key in wide:
        assert narrow[key].isfinite().all(), key
        assert relative_error(narrow[key].float(), wide[key]) < 0.2, key
    again = run(tiny.float(), images)
    assert all(value.isfinite().all() for value in again.values())


def test_nan_images_are_refused(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"].clone()
    images[1, 2, 0, 3, 3] = float("nan")
    geoaccel.accelerate(tiny, merging=come())
    with pytest.raises(ValueError, match="photograph 2 of scene 1 holds NaN"):
        tiny(images)


def test_few_tokens_are_left_alone_and_many_are_not(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=come(bypass=True))
    merged = run(tiny, images)
    assert all(torch.equal(merged[key], dense[key]) for key in dense)
    assert "would take" in packer_of(tiny).effect.bypassed
    mini = CoMePacker(CoMe(), Span(layer=1, within=5, across=4, heads=6, head_dim=32), None)
    assert mini.why_dense(TokenLayout(1, 16, (16, 16), 5), "cpu") is None
    assert mini.why_dense(TokenLayout(1, 1, (3, 3), 5), "cpu") is not None
    assert mini.why_dense(TokenLayout(1, 1, (16, 16), 5), "cuda") is not None


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 is not in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio=-0.1 is not in"),
        ({"variant": "fused"}, "variant='fused'; known: packed, direct"),
        ({"choose": "best"}, "choose='best'; known: most_alike, least_confident, random, most_confident"),
        ({"predictor": "p.safetensors"}, "choose='most_alike' reads no predictor, and one was given; leave it out"),
        ({"predictor": "untrained", "choose": "random"}, "choose='random' reads no predictor"),
        ({"scope": "batch"}, "scope='batch'; known: scene, frame"),
        ({"group": (1, 1)}, r"group=\(1, 1\)"),
        ({"group": (3,)}, r"group=\(3,\)"),
        ({"group": (0, 3)}, r"group=\(0, 3\)"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        come(**knobs)


def test_a_packing_of_equal_frames_runs_as_one_batch() -> None:
    """Per-frame quantiles on a divisible grid leave all frames equally long."""
    layout = layout_of((6, 9))
    scores = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    packing = pack_groups(layout, THREE, lowest(scores, 0.5, "frame"))
    assert len(set(packing.frame_lengths)) == 1
    assert isinstance(packing, Packing)
