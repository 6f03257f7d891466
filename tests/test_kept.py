"""What is kept on a device for the forwards that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from geoaccel import kept

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """What may be made."""

    first: Tensor
    rest: tuple[Tensor | None, ...]


@pytest.fixture
def counted() -> Iterator[tuple[Callable[..., Pair], list[int]]]:
    """A function of a size and a device, and the sizes that it was asked for."""
    made: list[int] = []

    @kept.kept
    def pair(size: int, device: torch.device, *, offset: int = 0) -> Pair:
        made.append(size)
        return Pair(torch.zeros(size, device=device) + offset, (torch.zeros(size, device=device), None))

    kept.forget()
    yield pair, made
    kept.forget()


def test_made_once_for_equal_arguments(counted: tuple[Callable[..., Pair], list[int]]) -> None:
    pair, made = counted
    assert pair(3, CPU) is pair(3, CPU)
    assert pair(3, CPU, offset=1).first.sum() == 3
    assert made == [3, 3]
    assert kept.kept_bytes() == 4 * 3 * 4
    kept.forget()
    assert kept.kept_bytes() == 0


def test_what_was_used_longest_ago_goes_first(
    counted: tuple[Callable[..., Pair], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, made = counted
    monkeypatch.setattr(kept, "LIMIT_BYTES", 400)
    for size in (10, 20, 10, 25, 10, 20, 1000, 1000):
        pair(size, CPU)
    assert made == [10, 20, 25, 20, 1000, 1000]  # 8 bytes a unit: 25 displaces 20, which displaces 25; 1000 never fits
    assert kept.kept_bytes() <= 400


def test_made_in_inference_mode_it_serves_training(counted: tuple[Callable[..., Pair], list[int]]) -> None:
    pair, _ = counted
    with torch.inference_mode():
        pair(3, CPU)
    weight = torch.ones(3, requires_grad=True)
    (weight * pair(3, CPU).first).sum().backward()
    assert weight.grad is not None


def test_tensors_without_numbers_are_not_kept(counted: tuple[Callable[..., Pair], list[int]]) -> None:
    pair, _ = counted
    with FakeTensorMode():
        pair(3, CPU)
    pair(3, torch.device("meta"))
    assert kept.kept_bytes() == 0
    assert type(pair(3, CPU).first) is Tensor
    with FakeTensorMode():
        assert isinstance(pair(3, CPU).first, FakeTensor)
    assert type(pair(3, CPU).first) is Tensor
