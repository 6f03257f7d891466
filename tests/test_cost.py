"""The cost model against counted FLOPs, part by part, and against the published arithmetic at full size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import geoaccel
from geoaccel.cost import EMBEDDING, HEADS, MATCHING, PRODUCTS, Cost, Trunk
from geoaccel.merging.alike import Alike
from geoaccel.merging.fastvggt import FastVGGT
from geoaccel.merging.httm import HTTM
from geoaccel.merging.method import Merging
from geoaccel.models import BACKBONES, build

SIZES = [(1, (70, 98)), (3, (98, 70)), (5, (56, 56))]
CAPS = [(1, 1.05), (10, 1.54), (20, 2.07), (50, 3.68), (100, 6.36), (300, 17.1), (500, 27.8), (1000, 54.6)]
DIVIDED = [(10, 2, 1.17), (10, 8, 1.35), (100, 4, 2.53), (100, 16, 4.10), (300, 8, 5.27), (1000, 32, 18.5)]

Counts = Mapping[str, Mapping[Any, int]]


@torch.no_grad()
def counted(model: nn.Module, images: Tensor, **options: Any) -> Counts:
    """FLOPs of a forward by module and operation."""
    with FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(images, **options)
    return counter.get_flop_counts()


def total(counts: Counts) -> int:
    return sum(counts["Global"].values())


def photographs(frames: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(1, frames, 3, *size, generator=torch.Generator().manual_seed(0))


def by_part(model: nn.Module, counts: Counts) -> dict[str, int]:
    """The same sums as the cost model's, read off the modules; attention must run as plain matrix products."""
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    embedding = model.get_submodule(model.backbone.patch_embedding)  # type: ignore[union-attr, arg-type]
    parts = {EMBEDDING: counts[names[embedding]][torch.ops.aten.convolution]}
    for kind, sites in model.backbone.sites(model).items():  # type: ignore[union-attr,operator]
        linears = products = 0
        for site in sites:
            block = counts[names[site].removesuffix(".attn")]
            linears += block[torch.ops.aten.addmm]
            products += block.get(torch.ops.aten.bmm, 0)
        parts |= {f"{kind} linears": linears, f"{kind} products": products}
    parts[HEADS] = total(counts) - sum(parts.values())
    return parts


@pytest.mark.parametrize(("frames", "size"), SIZES)
def test_every_part_is_what_is_counted(tiny: nn.Module, frames: int, size: tuple[int, int]) -> None:
    """To the last FLOP, without heads."""
    model = geoaccel.accelerate(tiny, attention="matmul")
    counts = counted(model, photographs(frames, size))
    expected = by_part(model, counts)
    heads = expected.pop(HEADS)
    assert heads > 0
    cost = model.trunk.cost(frames, size, heads=heads)
    assert cost.parts == {**expected, HEADS: heads}
    assert cost.total == total(counts)


def test_vggt_mini_costs_what_is_counted() -> None:
    model = geoaccel.accelerate(geoaccel.load_model("vggt-mini", dtype=torch.float32), attention="matmul")
    counts = counted(model, photographs(2, (56, 84)))
    assert model.cost(2, (56, 84)).parts == pytest.approx(by_part(model, counts), rel=1e-4)


def test_heads_are_counted_one_by_one(tiny: nn.Module) -> None:
    """Frames of VGGT's camera head see each other: what that takes grows with their square, and is left out."""
    model, size = geoaccel.accelerate(tiny, attention="matmul"), (70, 98)
    images = photographs(3, size)
    all_heads = model.cost(3, size)
    assert all_heads.total == pytest.approx(total(counted(model, images)), rel=1e-3)
    camera = model.cost(3, size, ["camera"])
    assert camera.total == pytest.approx(total(counted(model, images, heads=["camera"])), rel=1e-3)
    assert 0 < camera.parts[HEADS] < all_heads.parts[HEADS]


@pytest.mark.parametrize("method", [FastVGGT(bypass=False), HTTM(bypass=False, outliers=0)], ids=["fastvggt", "httm"])
def test_merging_costs_what_is_counted(tiny: nn.Module, method: Merging) -> None:
    frames, size = 3, (70, 98)
    images = photographs(frames, size)
    # A fused kernel is not counted on a CPU: what is left of its products is matching.
    both, matching = (
        by_part(tiny, counted(geoaccel.accelerate(tiny, merging=method, attention=kernel), images))[PRODUCTS]
        for kernel in ("matmul", "sdpa")
    )
    effects = geoaccel.describe(tiny).merging[0].effects
    (queries,), (keys,) = {e.queries / e.tokens for e in effects}, {e.keys / e.tokens for e in effects}
    assert queries < 0.7
    dense = tiny.trunk.cost(frames, size)
    merged = dense.merged(queries, keys, matching=matching)
    assert merged.parts[PRODUCTS] + merged.parts[MATCHING] == pytest.approx(both, rel=1e-9)
    assert merged.merged(1, 1, matching=5).parts[MATCHING] == matching + 5


def test_packing_costs_what_is_counted(tiny: nn.Module) -> None:
    """Co-Me behind the first of the encoder's two blocks, every frame keeping as many tokens."""
    frames, size = 3, (56, 84)
    method = Alike(tap=0, scope="frame", bypass=False)
    model = geoaccel.accelerate(tiny, merging=method, attention="matmul")
    counts = by_part(model, counted(model, photographs(frames, size)))
    (effect,) = geoaccel.describe(model).merging[0].effects
    assert effect.effective_ratio > 0.2
    cost = model.trunk.cost(frames, size).packed(effect.queries / effect.tokens, encoder=0.5)
    assert cost.tokens == effect.queries
    counts.pop(HEADS, None)  # they are not the trunk's
    assert {**cost.parts, **counts} == pytest.approx(cost.parts, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_full_size_costs_what_is_counted(backbone: str) -> None:
    """A billion parameters on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = build(backbone).eval()
        images = torch.empty(1, 3, 3, 392, 518)
    counts = counted(model, images)
    cost = model.cost(3, (392, 518))
    assert cost.parts == pytest.approx(by_part(model, counts), rel=1e-4)


VGGT_1B = Trunk(1024, 14, 24, 24, 24, 5, 5)
"""Heads are given: two dense heads and a camera head take 0.597 TFLOP a frame at 518 x 518, 0.451 at 392 x 518."""


def test_published_arithmetic_of_vggt() -> None:
    """TFLOP of one frame of 37 x 37 patches, and speedup limits."""
    parts = VGGT_1B.cost(1, (518, 518), heads=0.597e12).parts
    within = [sum(value for name, value in parts.items() if kind in name) for kind in ("encoder", "frame")]
    assert within == pytest.approx([1.016e12, 1.016e12], rel=1e-3)
    assert parts["global linears"] == pytest.approx(0.830e12, rel=1e-3)
    assert parts[PRODUCTS] == pytest.approx(0.1856e12, rel=1e-3)
    for frames, limit in CAPS:
        assert VGGT_1B.cost(frames, (518, 518), heads=frames * 0.597e12).limit == pytest.approx(limit, rel=6e-3)


@pytest.mark.parametrize(("frames", "divisor", "speedup"), DIVIDED)
def test_published_speedups_of_cheaper_attention(frames: int, divisor: int, speedup: float) -> None:
    dense = VGGT_1B.cost(frames, (392, 518), heads=frames * 0.451e12)
    merged = dense.merged(1 / divisor, 1)
    assert dense.total / merged.total == pytest.approx(speedup, rel=6e-3)
    assert 0 < dense.limit_share(dense.total / merged.total) == pytest.approx(1 - 1 / divisor)


ROUND = Cost(
    100,
    {
        "patch embedding": 1.0,
        "encoder linears": 6.0,
        "encoder products": 2.0,
        "frame linears": 4.0,
        "frame products": 8.0,
        "global linears": 4.0,
        "global products": 60.0,
        "heads": 15.0,
    },
)


def test_the_limit_is_reached_where_products_cost_nothing() -> None:
    assert ROUND.total == 100
    assert ROUND.share("heads") == 0.15
    assert ROUND.limit == 2.5
    assert ROUND.limit_share(2.5) == 1
    assert ROUND.limit_share(1.0) == 0
    assert ROUND.limit_share(1.25) == pytest.approx(1 / 3)
    assert ROUND.limit_share(0.5) == pytest.approx(-5 / 3)
    assert ROUND.limit_share(5.0) > 1
    assert ROUND.merged(0, 0).total == 40
    assert ROUND.merged(0.2, 0.3, matching=1.0).parts == {**ROUND.parts, PRODUCTS: pytest.approx(3.6), MATCHING: 1.0}
    assert MATCHING not in ROUND.merged(0.2, 0.3).parts


def test_packing_shortens_linears_once_and_products_twice() -> None:
    packed = ROUND.packed(0.5, encoder=0.25, matching=3.0)
    assert packed.tokens == 50
    assert packed.parts == {
        "patch embedding": 1.0,
        "encoder linears": 6 * 0.875,
        "encoder products": 2 * 0.8125,
        "frame linears": 2.0,
        "frame products": 2.0,
        "global linears": 2.0,
        "global products": 15.0,
        "heads": 15.0,
        "matching": 3.0,
    }
    assert ROUND.packed(0.5).parts["encoder linears"] == 6


@pytest.mark.parametrize("speedup", [0.0, -1.0, float("nan")])
def test_a_speedup_is_positive(speedup: float) -> None:
    with pytest.raises(ValueError, match="is not positive"):
        ROUND.limit_share(speedup)


def test_nothing_is_left_to_save_without_products() -> None:
    with pytest.raises(ValueError, match="no products left to save"):
        ROUND.merged(0, 0).limit_share(2.0)
