"""Methods that always act, and outputs that can be compared: for the tests that run over the registry.

Tiny models have so few tokens that every method would leave them alone, so bypassing is off here. A method with other
knobs has a line in IDLE_KNOBS, one that needs something that tiny models do not have a line in NEEDED_KNOBS.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from merging_scenes import photographs
from references import IDLE_KNOBS, NEEDED_KNOBS
from torch import Tensor, nn

from geoaccel.merging import MERGING


def knobs_of(name: str) -> list[str]:
    return list(inspect.signature(MERGING[name]).parameters)


def make(name: str, **knobs: Any) -> Any:
    """A method that never bypasses itself."""
    assert "bypass" in knobs_of(name), f"{name} needs the knob bypass, or nothing of it is tested"
    return MERGING[name](**{"bypass": False, **NEEDED_KNOBS.get(name, {}), **knobs})


def nothing(name: str) -> Any:
    return make(name, **IDLE_KNOBS.get(name, {"ratio": 0}))


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


IMAGES = photographs(3, (5, 7))
