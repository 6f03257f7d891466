"""The cost model against counted FLOPs, and against the published arithmetic at full size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from geoaccel.cost import PRODUCTS, Cost, Trunk
from geoaccel.models import BACKBONES, build


def counted(model: nn.Module, frames: int, size: tuple[int, int], **options) -> float:
    """FLOPs of a forward on the meta device."""
    images = torch.empty(1, frames, 3, *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images, **options)
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def full_size(request: pytest.FixtureRequest) -> nn.Module:
    with torch.device("meta"):
        return build(request.param).eval().requires_grad_(False)


@pytest.mark.parametrize(("frames", "size"), [(1, (70, 98)), (3, (98, 70)), (5, (56, 56))])
def test_tiny_networks_cost_what_is_counted(tiny: nn.Module, frames: int, size: tuple[int, int]) -> None:
    network = tiny.to("meta").requires_grad_(False)
    assert network.cost(frames, size).total == pytest.approx(counted(network, frames, size), rel=1e-3)


def test_heads_can_be_left_out(tiny: nn.Module) -> None:
    network = tiny.to("meta").requires_grad_(False)
    one = "camera"
    assert network.cost(2, (70, 98), [one]).total == pytest.approx(counted(network, 2, (70, 98), heads=[one]), rel=1e-3)
    assert network.cost(2, (70, 98), []).parts["heads"] == 0


@pytest.mark.slow
def test_full_size_costs_what_is_counted(full_size: nn.Module) -> None:
    assert full_size.cost(3, (392, 518)).total == pytest.approx(counted(full_size, 3, (392, 518)), rel=1e-5)


def test_published_arithmetic_of_vggt() -> None:
    """24 layers of width 1024 at 37 x 37 patches: TFLOP of one frame, and limits at 28 x 37 patches."""
    trunk = Trunk(1024, 14, 24, 24, 24, 5, 5)
    parts = trunk.cost(1, (518, 518)).parts
    published = {"encoder": 1.016e12, "frame": 1.016e12, "global": 0.830e12, PRODUCTS: 0.1856e12, "heads": 0}
    assert parts == pytest.approx(published, rel=1.5e-3)
    for frames, limit in ((10, 1.42), (100, 5.17), (1000, 42.7)):
        # Two dense heads and a camera head: 0.451 TFLOP a frame.
        assert trunk.cost(frames, (392, 518), heads=frames * 0.451e12).limit == pytest.approx(limit, rel=3e-3)


def test_the_limit_is_reached_where_products_cost_nothing() -> None:
    cost = Cost(100, {"encoder": 1.0, "frame": 1.0, "global": 1.0, PRODUCTS: 6.0, "heads": 1.0})
    assert cost.limit == pytest.approx(2.5)
    assert cost.limit_share(2.5) == pytest.approx(1)
    assert cost.limit_share(1.0) == 0
    assert cost.limit_share(0.5) < 0
    assert cost.merged(0, 0).total == 4
    assert cost.merged(0.2, 0.3, matching=1.0).parts[PRODUCTS] == pytest.approx(6 * 0.06 + 1)
    packed = cost.packed(0.5)
    assert packed.total == pytest.approx(1 + 0.5 + 0.5 + 1.5 + 1)
    assert packed.tokens == 50
