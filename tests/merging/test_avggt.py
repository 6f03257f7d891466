"""AVGGT: which layers are frame attention, which keys the others see, and one softmax over all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merging_scenes import Scene
from torch import Tensor, nn

import geoaccel
from geoaccel.api import check_methods
from geoaccel.attention_kernels import OWN_CHUNK, attend_with_own
from geoaccel.errors import UserError
from geoaccel.merging.avggt import AVGGT, EarlyMixer, GridMixer, on_grid


def by_hand(scene: Scene, stride: int, log_bias: bool) -> Tensor:
    """The softmax of the docstring, query by query, in float64."""
    q, k, v = (t.double() for t in (scene.q, scene.k, scene.v))
    height, width = scene.layout.grid
    first = [min((stride - 1) // 2, (side - 1) // 2) for side in (height, width)]
    kept = []
    for token in range(scene.layout.tokens_per_scene):
        patch = token % scene.layout.tokens_per_frame - scene.layout.num_special
        row, column = divmod(patch, width)
        kept.append(patch < 0 or ((row - first[0]) % stride == 0 and (column - first[1]) % stride == 0))
    on = torch.tensor(kept)
    out = torch.empty_like(q)
    for token in range(len(kept)):
        keys, values, bias = [k[:, :, on]], [v[:, :, on]], [torch.zeros(int(on.sum()))]
        keys.append(k[:, :, ~on].mean(2, keepdim=True))
        values.append(v[:, :, ~on].mean(2, keepdim=True))
        bias.append(torch.tensor([math.log(int((~on).sum())) if log_bias else 0.0]))
        if not kept[token]:
            keys.append(k[:, :, token : token + 1])
            values.append(v[:, :, token : token + 1])
            bias.append(torch.zeros(1))
        logits = q[:, :, token : token + 1] @ torch.cat(keys, 2).mT / math.sqrt(q.shape[-1]) + torch.cat(bias)
        out[:, :, token : token + 1] = logits.softmax(-1) @ torch.cat(values, 2)
    return out


@pytest.mark.parametrize("kernel", ["sdpa", "matmul"])
@pytest.mark.parametrize(("stride", "log_bias"), [(2, False), (4, True)])
def test_grid_own_key_and_mean_are_one_softmax(stride: int, log_bias: bool, kernel: str) -> None:
    scene = Scene(3, (5, 7), batch=2)
    mixer = AVGGT(stride=stride, log_bias=log_bias, bypass=False).mixer(kernel)
    wanted = by_hand(scene, stride, log_bias)
    torch.testing.assert_close(scene.through(mixer).double(), wanted, rtol=1e-4, atol=1e-5)


def test_both_ways_of_adding_keys_agree_over_several_chunks() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 2 * OWN_CHUNK + 3, 8), torch.randn(1, 2, 5, 8)
    own = torch.zeros(q.shape[2]).masked_fill(torch.arange(q.shape[2]) % 3 == 0, -math.inf)
    keys: dict[str, Any] = {"shared": (k[:, :, :1], k[:, :, 1:2], 0.7), "own": (2 * q, q.flip(2), own)}
    found = [attend_with_own(q, k, k + 1, kernel=kernel, **keys) for kernel in ("sdpa", "matmul")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "early"), [(24, 9), (36, 13), (18, 7), (4, 1), (2, 1), (1, 0)])
def test_early_layers_are_frame_attention_in_proportion(depth: int, early: int) -> None:
    kinds = [type(mixer) for mixer in AVGGT().mixers("sdpa", depth)]
    assert kinds == [EarlyMixer] * early + [GridMixer] * (depth - early)
    assert [type(mixer) for mixer in AVGGT(frame_layers=1).mixers("sdpa", depth)].count(EarlyMixer) == 1


def test_an_early_layer_sees_frames_alone() -> None:
    scene = Scene(3, (4, 5))
    mixer = AVGGT(bypass=False).mixers("sdpa", 24)[0]
    frames = torch.arange(3).repeat_interleave(scene.layout.tokens_per_frame)
    hidden = torch.zeros(len(frames), len(frames)).masked_fill(frames[:, None] != frames[None], -math.inf)
    logits = scene.q @ scene.k.mT / math.sqrt(scene.q.shape[-1]) + hidden
    torch.testing.assert_close(scene.through(mixer), logits.softmax(-1) @ scene.v, rtol=1e-4, atol=1e-5)


def test_the_grid_is_even_and_never_empty() -> None:
    cpu = torch.device("cpu")
    subset = on_grid(2, (8, 12), 2, 4, cpu)
    second = subset.index[subset.index >= 98] - 98
    assert second.tolist() == [0, 1, *(2 + row * 12 + column for row in (1, 5) for column in (1, 5, 9))]
    assert subset.own.isinf().nonzero()[:, 0].tolist() == subset.index.tolist()
    assert float(subset.mean.sum()) == pytest.approx(1)
    assert len(on_grid(1, (1, 2), 0, 16, cpu).index) == 1
    assert on_grid(2, (8, 12), 2, 4, cpu) is subset


@pytest.mark.parametrize(("knobs", "says"), [
    ({"stride": 0}, "stride=0"), ({"stride": 2.5}, "must be a whole number"), ({"frame_layers": -1}, "frame_layers=-1"),
    ({"frame_layers": "all"}, "must be a whole number"),
])  # fmt: skip
def test_wrong_knobs_are_refused(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"avggt: .*{says}"):
        AVGGT(**knobs)


def test_more_frame_layers_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="this network has only 4 global layers"):
        AVGGT(frame_layers=5).mixers("sdpa", 4)


@pytest.mark.parametrize("how", ["merging", "layers"])
def test_a_kernel_that_gives_no_query_its_own_key_is_refused(tiny: nn.Module, how: str) -> None:
    choice: Any = AVGGT() if how == "merging" else {0: "avggt"}
    with pytest.raises(UserError, match=r"key of its own, which attention='fp8' cannot do; choose attention='sdpa'"):
        geoaccel.accelerate(tiny, attention="fp8", **{how: choice})
    assert "avggt" not in str(geoaccel.describe(tiny))
    with pytest.raises(UserError, match="cannot do"):
        check_methods(merging="avggt", attention="fp8")
