"""Co-Me and alike: the choice of groups, and the cut through both backbones; `test_come_packing` has the groups."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from merging_scenes import THREE, layout_of, some_flags, tokens
from references import Golden, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.api import place_mixer
from geoaccel.attention import AttentionContext, DenseMixer, ForwardState, Restore
from geoaccel.layout import TokenLayout
from geoaccel.merging.alike import Alike, Likeness
from geoaccel.merging.come import Choice, CoMe
from geoaccel.merging.confidence import Tap
from geoaccel.merging.group_merging import GroupMerging, GroupPacker, Span
from geoaccel.merging.groups import pack_groups
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.stream import TokenStream

RANKINGS = ["most_alike", "least_confident"]  # ours, and the paper's


def merging(choose: str = "most_alike", **knobs: Any) -> GroupMerging:
    """Ours, or Co-Me in groups that suit a small grid; untrained predictors rank as reproducibly as trained ones."""
    if choose == "most_alike":
        return Alike(**{"bypass": False, **knobs})
    predictor = {"predictor": "untrained"} if "confident" in choose else {}
    return CoMe(**{"bypass": False, "group": None, "choose": choose, **predictor, **knobs})


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


@pytest.mark.parametrize("scope", ["scene", "frame"])
@pytest.mark.parametrize("variant", ["packed", "direct"])
def test_the_first_frame_can_stay_as_it_is(scope: Any, variant: Any) -> None:
    """And the others merge as if they were alone."""
    layout, others = TokenLayout(2, 4, (4, 6), 5), TokenLayout(2, 3, (4, 6), 5)
    span = Span(layer=1, within=5, across=4, heads=1, head_dim=8)
    x = tokens(layout)
    state = ForwardState()
    anchored = GroupPacker(merging(anchor=True, scope=scope, variant=variant), span, Likeness())
    _, packing = anchored(x, layout, state)  # type: ignore[misc]
    free = GroupPacker(merging(scope=scope, variant=variant), span, Likeness())
    _, alone = free(x[:, 1:], others, state)  # type: ignore[misc]
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
    assert anchored(tokens(one), one, state) is None
    assert anchored.effect.bypassed == "the only frame is the anchor"  # type: ignore[union-attr]
    assert GroupPacker(merging(), span, Likeness())(tokens(one), one, state) is not None


def test_an_anchor_that_leaves_too_little_to_merge_counts_as_such() -> None:
    """Bypassing knows that the first frame saves nothing."""
    span = Span(layer=1, within=5, across=4, heads=6, head_dim=32)
    least = {}
    for anchor in (False, True):
        packer = GroupPacker(Alike(anchor=anchor), span, Likeness())
        gains = {side: packer.predicted(TokenLayout(1, 2, (side, side), 5), torch.empty(0)) for side in range(2, 60, 2)}
        least[anchor] = next(side for side, gain in gains.items() if gain > 1.15)
    assert least[False] < least[True]


@pytest.mark.parametrize(("choose", "surest_last"), [("least_confident", True), ("most_confident", False)])
def test_confidence_orders_the_groups(tiny: nn.Module, choose: str, surest_last: bool) -> None:
    """The paper merges what will be least confident."""

    class FirstChannel(nn.Module):
        def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
            return patches[..., 0].unflatten(-1, grid)

    ranking: Any = merging(choose).ranking(Tap.of(tiny, None))
    ranking.predictor = FirstChannel()
    confidence = torch.arange(16.0).view(1, 1, 4, 4)  # grows from group to group, row by row
    scores = ranking(confidence.flatten(2)[..., None], (4, 4), (2, 2)).flatten()
    assert scores.argsort().tolist() == ([0, 1, 2, 3] if surest_last else [3, 2, 1, 0])


def test_controls_choose_other_groups(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    answers = {}
    for choose in ("most_alike", *get_args(Choice)):
        geoaccel.accelerate(tiny, merging=merging(choose=choose))
        answers[choose] = (run(tiny, images), packer_of(tiny).effect)
    key = next(iter(answers["random"][0]))
    for a, b in itertools.combinations(answers, 2):
        assert not torch.equal(answers[a][0][key], answers[b][0][key])
    geoaccel.accelerate(tiny, merging=merging(choose="random", seed=1))
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
    geoaccel.accelerate(tiny, merging=merging())
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


@pytest.mark.parametrize("log_bias", [True, False])
def test_keys_are_weighed_only_where_the_method_says_so(tiny: nn.Module, golden: Golden, log_bias: bool) -> None:
    probe = Probe()
    geoaccel.accelerate(tiny, merging=merging(log_bias=log_bias))
    place_mixer(tiny, probe, "global")
    run(tiny, golden["inputs.images"])
    told = [context.log_weight is not None for _, context in probe.seen]  # type: ignore[attr-defined]
    assert told == [log_bias] * len(tiny.backbone.sites(tiny)["global"])  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("grid", "group"), [((24, 24), (3, 3)), ((23, 40), (2, 2)), ((40, 23), (2, 2)), ((37, 28), (3, 3))]
)
def test_groups_are_small_on_small_grids(grid: tuple[int, int], group: tuple[int, int]) -> None:
    assert Alike().group_on(grid) == group
    assert CoMe().group_on(grid) == (3, 3)  # the paper's
    assert CoMe(group=(4, 1)).group_on(grid) == (4, 1)


def test_flat_places_merge_first(tiny: nn.Module) -> None:
    """Half of each photograph is of one colour, the other is noise."""
    images = torch.rand(1, 2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    images[..., 56:] = 0.5
    probe = Probe()
    geoaccel.accelerate(tiny, merging=merging(ratio=0.5))
    place_mixer(tiny, probe, "global")
    run(tiny, images)
    packing = probe.seen[0][1].packing  # type: ignore[attr-defined]
    merged = packing.weight[packing.owner[:, :, -64:]].unflatten(2, (8, 8)) > 1
    assert 0.3 < merged.float().mean() < 0.6
    assert merged[..., 4:].sum() > 10 * merged[..., :4].sum()


# ------------------------------------------------------------------------------------------------- whole models


def test_ratio_zero_is_the_dense_model_bit_for_bit(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=merging(ratio=0))
    merged = run(tiny, images)
    assert all(torch.equal(merged[key], dense[key]) for key in dense)
    assert packer_of(tiny).effect.bypassed == "ratio 0 merges nothing"


def test_packed_rows_without_a_merged_group_equal_the_dense_model(
    tiny: nn.Module, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything runs packed, and nothing is merged."""
    images = golden["inputs.images"]
    dense = run(tiny, images)
    monkeypatch.setattr(
        "geoaccel.merging.group_merging.lowest", lambda scores, *_: torch.zeros_like(scores, dtype=torch.bool)
    )
    geoaccel.accelerate(tiny, merging=merging())
    merged = run(tiny, images)
    effect = packer_of(tiny).effect
    assert (effect.bypassed, effect.effective_ratio) == (None, 0)
    for key in dense:
        assert relative_error(merged[key], dense[key]) < 1e-5, key


@pytest.mark.parametrize("choose", RANKINGS)
@pytest.mark.parametrize("variant", ["packed", "direct"])
@pytest.mark.parametrize("scope", ["scene", "frame"])
def test_batch_of_two_equals_two_runs(tiny: nn.Module, golden: Golden, choose: str, variant: Any, scope: Any) -> None:
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, merging=merging(choose=choose, variant=variant, scope=scope))
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
    geoaccel.accelerate(tiny, merging=merging(choose=choose))
    straight, permuted = run(tiny, images), run(tiny, images[:, order])
    for key, value in straight.items():
        assert relative_error(permuted[key], value[:, order]) < 1e-4, key


@pytest.mark.parametrize("size", [(70, 98), (112, 56), (28, 28), (14, 70)])
@pytest.mark.parametrize("choose", RANKINGS)
@pytest.mark.parametrize("variant", ["packed", "direct"])
def test_any_grid_and_one_frame(tiny: nn.Module, size: tuple[int, int], choose: str, variant: Any) -> None:
    geoaccel.accelerate(tiny, merging=merging(choose=choose, variant=variant, ratio=0.9))
    images = torch.rand(1, 1, 3, *size, generator=torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() for value in run(tiny, images).values())


@pytest.mark.parametrize("choose", RANKINGS)
def test_bfloat16_and_back(tiny: nn.Module, golden: Golden, choose: str) -> None:
    """The predictor follows the model's dtype, in inference mode too; only near ties may fall differently."""
    images = golden["inputs.images"]
    geoaccel.accelerate(tiny, merging=merging(choose=choose))
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
    geoaccel.accelerate(tiny, merging=merging())
    with pytest.raises(ValueError, match="image 2 of scene 1 holds NaN"):
        tiny(images)


def test_few_tokens_are_left_alone_and_many_are_not(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=merging(bypass=True))
    merged = run(tiny, images)
    assert all(torch.equal(merged[key], dense[key]) for key in dense)
    assert "x predicted, below min_gain=1.15" in packer_of(tiny).effect.bypassed
    mini = GroupPacker(Alike(), Span(layer=1, within=5, across=4, heads=6, head_dim=32), Likeness())
    assert mini.predicted(TokenLayout(1, 16, (16, 16), 5), torch.empty(0)) > 1.15
    assert mini.predicted(TokenLayout(1, 1, (3, 3), 5), torch.empty(0)) < 1
    assert mini.predicted(TokenLayout(1, 1, (16, 16), 5), torch.empty(0, device="meta")) < 1.15


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 is not in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio=-0.1 is not in"),
        ({"variant": "fused"}, "variant='fused'; known: packed, direct"),
        ({"choose": "best"}, "choose='best'; known: least_confident, most_confident, random"),
        ({"predictor": "untrained", "choose": "random"}, "choose='random' does not use a predictor"),
        ({"scope": "batch"}, "scope='batch'; known: scene, frame"),
        ({"group": (1, 1)}, r"group=\(1, 1\)"),
        ({"group": (3,)}, r"group=\(3,\)"),
        ({"group": (0, 3)}, r"group=\(0, 3\)"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"come: {message}"):
        CoMe(**knobs)
    if not {"choose", "predictor"} & knobs.keys():
        with pytest.raises(ValueError, match=f"alike: {message}"):
            Alike(**knobs)
