"""Times on paper: against sums that can be done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from geoaccel.cost import HEADS, PRODUCTS
from geoaccel.layout import TokenLayout
from geoaccel.merging import Asymmetric
from geoaccel.merging.key_subset import KeySubset
from geoaccel.models import BACKBONES
from geoaccel.sharding.predict import Cluster, number_of_keys, predict

SIZE = (56, 70)


@pytest.fixture(scope="module")
def network() -> Any:
    with torch.device("meta"):
        return BACKBONES["pi3"].network(BACKBONES["pi3"].tiny)


def test_one_gpu_waits_for_nobody(network: Any) -> None:
    cluster = Cluster(linear_flops=1e9, attention_flops=1e8, head_flops=1e7)
    found, parts = predict(network, 6, SIZE, 1, cluster), network.cost(6, SIZE).parts
    rest = sum(parts.values()) - parts[HEADS] - parts[PRODUCTS]
    assert found.seconds == pytest.approx(rest / 1e9 + parts[PRODUCTS] / 1e8 + parts[HEADS] / 1e7)
    assert found.layer_bytes == found.waiting == 0


def test_a_ring_hides_what_comes_and_the_slowest_rank_counts(network: Any) -> None:
    cluster = Cluster(attention_flops=1e8, inside=1e6, between=1e3, latency_s=0, per_machine=2)
    alone, three = (predict(network, 7, SIZE, gpus, cluster) for gpus in (1, 3))
    assert three.local == pytest.approx(3 / 7 * alone.local)
    assert three.attending == pytest.approx(3 / 7 * alone.attending)
    tokens = 7 * (4 * 5 + network.trunk.special)
    assert three.layer_bytes == pytest.approx(2 / 3 * 2 * 2 * 32 * tokens)
    layers = network.trunk.global_blocks
    block = 2 * 2 * 32 * tokens / 3 / 1e3  # over the link between machines: three do not fit into one
    assert three.waiting == pytest.approx(layers * 2 * (block - three.attending / layers / 3))
    fast = predict(network, 7, SIZE, 3, Cluster(attention_flops=1e6, latency_s=0))
    assert fast.waiting == 0


def test_a_gather_brings_fewer_bytes_and_hides_nothing(network: Any) -> None:
    cluster = Cluster(attention_flops=1e6, inside=1e9, latency_s=0.5)
    dense, few = (predict(network, 40, SIZE, 2, cluster, m) for m in (None, Asymmetric(stride=8)))
    assert few.layer_bytes < dense.layer_bytes
    assert few.attending < dense.attending
    assert dense.waiting == 0
    expected = network.trunk.global_blocks * (few.layer_bytes / 1e9 + 0.5)
    assert few.waiting == pytest.approx(expected)


@pytest.mark.parametrize("anchor", [True, False])
def test_keys_are_as_many_as_the_method_takes(anchor: bool) -> None:
    layout, method = TokenLayout(1, 30, (14, 15), 5), Asymmetric(stride=6, anchor=anchor, per_head=True)
    subset = KeySubset(30, (14, 15), 5, 6, anchor, 2)
    assert number_of_keys(layout, method, 24) == subset.index.shape[1]
    assert number_of_keys(layout, None, 24) == layout.tokens_per_scene
