"""Which tokens of a scene are keys: made once, whatever torch is doing meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.key_subset import KeySubset, pick


def test_a_stride_beyond_the_patches_keeps_one_of_each_frame() -> None:
    for heads in (1, 3):
        subset = KeySubset(5, (4, 6), 2, 10**6, True, heads)
        assert subset.index.shape == (heads, 5 * 2 + 24 + 4)
        frames = (subset.index[:, subset.whole :] // 26).tolist()
        assert frames == [[1, 2, 3, 4]] * heads
        assert subset.patches_each == 24
    method, layout = Asymmetric(stride=10**6, per_head=False), TokenLayout(1, 5, (4, 6), 2)
    assert method.keys_of(layout, layout.tokens_per_scene) == 5 * 2 + 24 + 4


@pytest.mark.parametrize("heads", [1, 2])
def test_the_subset_is_made_once_for_a_layout_and_serves_training_after_inference(heads: int) -> None:
    arguments: Any = (5, (4, 6), 2, 3, True, heads)
    with torch.inference_mode(), torch.device("meta"):
        first = KeySubset(*arguments)
        assert first.index.device.type == "cpu"
    with FakeTensorMode():
        first.on(torch.device("cpu"))
    assert KeySubset(*arguments).index.data_ptr() == first.index.data_ptr()
    k = torch.randn(1, 2, 5 * 26, 4, requires_grad=True)
    pick(k, k, first.index)[0].square().sum().backward()
    assert k.grad is not None
