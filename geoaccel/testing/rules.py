"""Rules of the conformance suite: functions that check a merging method on one network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.api import accelerate
from geoaccel.merging.method import AttentionMerging, Merging, SpanMerging
from geoaccel.models import BACKBONES

GRID = (5, 7)
"""Patches of an image: not square, and not a multiple of any method's cells."""


@dataclass(frozen=True)
class Trial:
    """A method on a network.

    Attributes:
        method: Class of the method.
        network: In eval mode; rules work on copies.
        knobs: Knobs for all rules.
        nothing: Knobs with which it merges nothing.
    """

    method: Callable[..., Merging]
    network: nn.Module
    knobs: Mapping[str, Any] = field(default_factory=dict)
    nothing: Mapping[str, Any] = field(default_factory=lambda: {"ratio": 0})

    def make(self, **knobs: Any) -> Merging:
        """The method, never bypassed."""
        return self.method(**{"bypass": False, **self.knobs, **knobs})

    def make_idle(self) -> Merging:
        """The method with knobs with which it merges nothing."""
        return self.make(**self.nothing)

    def dense(self) -> nn.Module:
        """A copy of the network."""
        return copy.deepcopy(self.network)

    def model(self, method: Merging | None = None) -> nn.Module:
        """A copy of the network with the method in it."""
        return accelerate(self.dense(), merging=self.make() if method is None else method)

    def images(self, frames: int = 3, grid: tuple[int, int] = GRID, *, batch: int = 1, seed: int = 0) -> Tensor:
        """Noise on a coarse pattern, so that patches differ: [B, S, 3, H, W]."""
        patch: int = self.network.preprocess.patch_size  # type: ignore[union-attr, assignment]
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch * frames, 3, *grid, generator=generator)
        smooth = F.interpolate(coarse, size=(patch * grid[0], patch * grid[1]), mode="bilinear")
        noise = torch.rand(smooth.shape, generator=generator)
        return (0.8 * smooth + 0.2 * noise).unflatten(0, (batch, frames))


Rule = Callable[[Trial], None]
MERGING_RULES: dict[str, Rule] = {}
"""Every rule by name, in the order in which they are checked."""

_ONLY_FOR: dict[str, type] = {}


def rule(only_for: type | None = None) -> Callable[[Rule], Rule]:
    """Decorator for a rule, for methods of one kind or for all."""

    def add(check: Rule) -> Rule:
        MERGING_RULES[check.__name__] = check
        if only_for is not None:
            _ONLY_FOR[check.__name__] = only_for
        return check

    return add


def check_rule(name: str, trial: Trial) -> bool:
    """Check one rule; False if it does not apply to this kind of method.

    Raises:
        AssertionError: If it is broken, or the method raises anything: the rule, the backbone, and why.
    """
    backbone: Any = trial.network.backbone
    who = getattr(trial.method, "__name__", repr(trial.method))
    broken = f"{who} on {backbone.name} breaks the rule {name!r}"
    try:
        method = trial.make()
        must(
            isinstance(method, AttentionMerging | SpanMerging),
            f"it is a {type(method).__name__}, neither an AttentionMerging nor a SpanMerging",
        )
        if not isinstance(method, _ONLY_FOR.get(name, object)):
            return False
        MERGING_RULES[name](trial)
    except AssertionError as error:
        raise AssertionError(f"{broken}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{broken}: it raises {type(error).__name__}: {error}") from error
    return True


def must(holds: bool, otherwise: str) -> None:
    """Raise an AssertionError with this message unless a condition holds, also under ``python -O``."""
    if not holds:
        raise AssertionError(otherwise)


def tiny_network(backbone: str) -> nn.Module:
    """A network of a registered backbone with random weights, the same on every call; torch's generator is left alone.

    Raises:
        ValueError: If there is no such backbone.
    """
    known = BACKBONES[backbone]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return known.network(known.tiny).eval()


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Predictions of a model, its tensors by name."""
    return tensors_of(model(images))


def tensors_of(predictions: Mapping[str, Any]) -> dict[str, Tensor]:
    """Predictions that are tensors, without the images."""
    return {key: value for key, value in predictions.items() if isinstance(value, Tensor) and key != "images"}


def must_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Bit for bit."""
    must(found.keys() == expected.keys(), f"{what}: predicts {list(found)}, expected {list(expected)}")
    for key, value in found.items():
        must(torch.equal(value, expected[key]), f"{what}: {key} differs{_by(value, expected[key])}")


def must_be_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, what: str) -> None:
    """In the relative error of the norm."""
    for key, value in found.items():
        error = relative_error(value, expected[key])
        must(error < bound, f"{what}: {key} is off by {error:.1e} of its norm, allowed is {bound:.0e}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _by(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f", it is {list(found.shape)} and not {list(expected.shape)}"
    return f" by {float((found.double() - expected.double()).abs().max()):.1e} at most"
