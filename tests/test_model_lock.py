"""Threads that share a model get what each would have got alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.model_lock import locked

WAIT = 20.0


def scene(seed: int) -> Tensor:
    return torch.rand(2 + seed, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def in_threads(calls: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("options", [{"reference": "auto"}, {"drop_outliers": True}])
def test_scenes_of_several_threads_do_not_meet(tiny: nn.Module, options: dict[str, Any]) -> None:
    def reconstructed(seed: int) -> Tensor:
        return geoaccel.reconstruct(scene(seed), model=tiny, **options).points_world

    alone = [reconstructed(seed) for seed in range(4)]
    found = in_threads([lambda seed=seed: reconstructed(seed) for seed in range(4)])
    assert all(torch.equal(own, other) for own, other in zip(found, alone, strict=True))


def test_another_thread_waits_for_the_same_model_alone() -> None:
    mine, other = nn.Linear(1, 1), nn.Linear(1, 1)
    inside, after = Event(), Event()

    def second(model: nn.Module) -> bool:
        with locked(model):
            inside.set()
            return after.is_set()

    with ThreadPoolExecutor(2) as pool:
        with locked(mine), locked(mine):
            waits = pool.submit(second, mine)
            assert pool.submit(second, other).result(WAIT) is False
            inside.clear()
            assert not inside.wait(0.05)
            after.set()
        assert waits.result(WAIT) is True
