"""The registry as fixtures: a test that asks for a method runs for every one that there is."""

from __future__ import annotations

from typing import Any

import pytest
from conformance import make
from torch import Tensor

from geoaccel.attention_kernels import KERNELS
from geoaccel.merging import MERGING, AttentionMerging, SpanMerging


@pytest.fixture(params=sorted(MERGING))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def method(name: str) -> Any:
    return make(name)


@pytest.fixture
def mixing(method: Any) -> AttentionMerging:
    """Methods that act in one attention."""
    if not isinstance(method, AttentionMerging):
        pytest.skip("acts on the token stream")
    return method


@pytest.fixture
def packing(method: Any) -> SpanMerging:
    """Methods that act on the token stream."""
    if not isinstance(method, SpanMerging):
        pytest.skip("acts in one attention")
    return method


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel that answers its queries; gives the number of keys of each call."""
    keys: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        keys.append(k.shape[2])
        return q

    monkeypatch.setitem(KERNELS._entries, "echo", kernel)
    return keys
