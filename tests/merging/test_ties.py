"""Where all tokens are equally alike, each method merges as many as otherwise, and the same ones every time."""

from __future__ import annotations

import pytest
import torch
from conformance import run
from merging_scenes import Scene
from torch import nn

import geoaccel
from geoaccel.merging import AttentionMerging, SpanMerging
from geoaccel.merging.groups import lowest


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_of_equal_tokens_as_many_merge_as_of_others(mixing: AttentionMerging, value: float) -> None:
    usual, tied = Scene(3, (5, 7), 2), Scene(3, (5, 7), 2)
    for t in (tied.q, tied.k, tied.x, tied.state.patches, tied.state.images):
        assert t is not None
        t.fill_(value)
    effects = []
    for scene in (usual, tied, tied):
        (mixer,) = mixing.mixers("sdpa", 1)
        scene.through(mixer)
        effects.append(mixer.effect)
    assert effects[0] == effects[1] == effects[2]


@torch.no_grad()
def test_packed_scenes_of_equal_tokens(tiny: nn.Module, packing: SpanMerging) -> None:
    rows = []
    # Six by six patches, so that all groups are of one size.
    noise = torch.rand(1, 3, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    for images in (noise, torch.full_like(noise, 0.5), torch.full_like(noise, 0.5)):
        geoaccel.accelerate(tiny, merging=packing)
        out = run(tiny, images)
        (action,) = geoaccel.describe(tiny).merging
        rows.append((action.effects, out))
    assert rows[0][0] == rows[1][0] == rows[2][0]
    assert all(torch.equal(rows[1][1][key], rows[2][1][key]) for key in rows[1][1])


@pytest.mark.parametrize("scope", ["scene", "frame"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.75, 0.9])
def test_lowest_marks_exactly_the_number(scope: str, share: float) -> None:
    """That of different scores, the first ones of equal scores, and the true lowest where only some are equal."""
    shape = (2, 3, 4, 5)
    distinct = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    axes = (1, 2, 3) if scope == "scene" else (2, 3)
    wanted = lowest(distinct, share, scope).sum(axes)  # type: ignore[arg-type]
    few = (distinct * 3).floor()
    for scores in (torch.zeros(shape), few):
        flags = lowest(scores, share, scope)  # type: ignore[arg-type]
        assert torch.equal(flags.sum(axes), wanted)
        assert torch.equal(flags, lowest(scores, share, scope))  # type: ignore[arg-type]
    flags = lowest(torch.zeros(shape), share, scope).flatten(axes[0])  # type: ignore[arg-type]
    assert (flags[..., :-1] >= flags[..., 1:]).all()
    chosen, left = few.masked_fill(~lowest(few, share, scope), -1), few.masked_fill(lowest(few, share, scope), 9)  # type: ignore[arg-type]
    assert (chosen.amax(axes) <= left.amin(axes)).all()


@pytest.mark.parametrize("count", [2, 7, 10, 11, 24, 101])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_of_different_scores_those_below_the_quantile_merge(count: int, share: float) -> None:
    scores = torch.rand(1, 1, 1, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    below = scores < scores.flatten().quantile(share) - 1e-12
    assert torch.equal(lowest(scores, share, "scene"), below)
