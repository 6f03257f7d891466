"""No merging method needs more memory than the dense model, counted to the byte.

The resident memory of a process differs by some percent from run to run. The bytes of all tensors that are alive at a
time do not: there is no tolerance. Without the dense heads, whose maps would hide what happens in the blocks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import geoaccel
from geoaccel.merging import MERGING
from geoaccel.merging.litevggt import gradient
from geoaccel.similarity import best_match

MODELS = ("vggt-mini", "pi3-mini")
SIDE = 112
ACTING = {"asymmetric": {"stride": 2}}
"""Knobs with which a method acts on few frames, where it otherwise does not."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, while they live. What a kernel allocates for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, made_here=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._note(tensor, made_here=True)
        return out

    def _note(self, tensor: Any, *, made_here: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@torch.no_grad()
def peak_of(call: Callable[[], Any]) -> int:
    """Most bytes alive at a time."""
    with LiveBytes() as live:
        call()
    return live.peak


@functools.cache
def network(name: str) -> nn.Module:
    return geoaccel.load_model(name)


@functools.cache
def dense_peak(name: str, frames: int) -> int:
    model = geoaccel.restore(network(name))
    return peak_of(lambda: model(photographs(frames), heads=("camera",)))


@functools.cache
def photographs(frames: int) -> Tensor:  # [1, S, 3, H, W]
    return torch.rand(1, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_the_count_follows_views_and_what_is_freed() -> None:
    given = torch.zeros(1000)

    def call() -> None:
        a = given + 1  # 4000 bytes
        b = a[:500].view(2, 250) + 1  # 2000 more
        del a
        c = torch.cat([b, b])  # 4000, beside b
        del b, c
        given.view(10, 100).sum()

    assert peak_of(call) == 6000


@pytest.mark.parametrize("frames", [2, 6])
@pytest.mark.parametrize("name", sorted(MERGING))
@pytest.mark.parametrize("backbone", MODELS)
def test_no_method_needs_more_than_the_dense_model(backbone: str, name: str, frames: int) -> None:
    images, dense = photographs(frames), dense_peak(backbone, frames)
    method = MERGING[name](bypass=False, **ACTING.get(name, {}))  # type: ignore[arg-type]
    model = geoaccel.accelerate(network(backbone), merging=method)
    peak = peak_of(lambda: model(images, heads=("camera",)))
    (action,) = geoaccel.describe(model).merging
    geoaccel.restore(model)
    assert not action.bypassed
    assert peak <= dense, f"{peak / dense:.3f} x dense"


def test_matching_takes_no_more_than_a_few_copies_of_the_tokens() -> None:
    """However many tokens there are: 4 million similarities here, of 65 thousand numbers."""
    tokens = torch.randn(1, 2048, 16, generator=torch.Generator().manual_seed(0))
    assert peak_of(lambda: best_match(tokens, tokens)) <= 3 * tokens.nbytes


def test_gradients_take_no_more_memory_than_the_images() -> None:
    """A padded grey image and its slopes: at most four planes at a time, where the images have three."""
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert peak_of(lambda: gradient(images, (8, 8))) <= 1.1 * images.nbytes
