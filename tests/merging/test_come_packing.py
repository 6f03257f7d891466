"""Co-Me's groups: which are merged, and how the others and they stand in rows, on any grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from merging_scenes import THREE, layout_of, some_flags, tokens
from references import relative_error
from torch import Tensor

from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.alike import spread
from geoaccel.merging.groups import group_means, lowest, num_groups, pack_groups
from geoaccel.models.layers.stream import TokenStream

GRIDS = [(6, 9), (5, 7), (7, 4), (2, 2), (1, 5), (4, 1), (1, 1)]


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


def test_a_packing_of_equal_frames_runs_as_one_batch() -> None:
    """Per-frame quantiles on a divisible grid leave all frames equally long."""
    layout = layout_of((6, 9))
    scores = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    packing = pack_groups(layout, THREE, lowest(scores, 0.5, "frame"))
    assert len(set(packing.frame_lengths)) == 1
    assert isinstance(packing, Packing)
