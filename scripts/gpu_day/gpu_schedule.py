"""Time budget: the expected time of a group of forwards, and the number of rounds for each group."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpu_journal import Journal

from geoaccel.errors import UserError
from geoaccel.models import BACKBONES, build
from geoaccel.models.weights import open_model

DENSE = "none"
FIRST_RATE = {"cuda": 2e14, "cpu": 2e10}
"""FLOP per second before anything was measured: half the speed of a large GPU, and a CPU core."""

LONG = 20.0
"""Seconds; a forward that takes longer has no warm-up."""

AROUND = 25.0
"""Overhead of a group in seconds: weights, photographs, the first call of every kernel."""


class Clock:
    """Seconds until the time limit."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Group:
    """Candidates that alternate on the same frames.

    Attributes:
        kind: ``merging``: methods against the dense model; ``quantization``: formats against bfloat16.
        model: Name of a backbone, or a checkpoint.
        frames: S.
        candidates: Names, the reference first.
    """

    kind: str
    model: str
    frames: int
    candidates: tuple[str, ...]

    @property
    def key(self) -> dict[str, object]:
        """Values common to its lines."""
        return {"group": self.kind, "model": self.model, "frames": self.frames}

    def __str__(self) -> str:
        return f"{self.model}, {self.frames} frames, {self.kind}"


@functools.cache
def flop(model: str, frames: int, size: tuple[int, int]) -> float:
    """FLOPs of a dense forward."""
    return float(_shapes(model).cost(frames, size).total)  # type: ignore[operator]


@functools.cache
def _shapes(model: str) -> torch.nn.Module:
    """The network, without weights or with those of a file."""
    if model not in BACKBONES:
        return open_model(model)
    with torch.device("meta"):
        return build(model)


def seconds_of(journal: Journal, group: Group, name: str, size: tuple[int, int], device: str) -> float:
    """Expected time of a candidate's forward: from its own runs, or from the highest speed so far."""
    own = journal.of("run", **group.key, candidate=name)
    if own:
        return float(own[-1]["ms"]) / 1000
    work = flop(group.model, group.frames, size)
    for candidate in (name, DENSE):
        runs = journal.of("run", model=group.model, candidate=candidate)
        if runs:
            last = max(runs, key=lambda line: line["frames"])
            return work / flop(group.model, last["frames"], size) * float(last["ms"]) / 1000
    return work / FIRST_RATE["cuda" if device.startswith("cuda") else "cpu"]


@dataclass(frozen=True)
class Cost:
    """Remaining cost of a group: seconds per round, overhead, and the number of rounds wanted."""

    turn: float
    around: float
    wanted: int

    def seconds(self, turns: int) -> float:
        return self.around + turns * self.turn if turns else 0.0


def allot(costs: Sequence[Cost], seconds: float) -> list[int]:
    """Rounds of each group within the given seconds: first one each, then all wanted, the cheapest first."""
    turns, left = [0] * len(costs), seconds
    cheapest = sorted(range(len(costs)), key=lambda index: costs[index].turn)
    for index in cheapest:
        if costs[index].wanted and costs[index].seconds(1) <= left:
            turns[index], left = 1, left - costs[index].seconds(1)
    for index in cheapest:
        while turns[index] and turns[index] < costs[index].wanted and costs[index].turn <= left:
            turns[index], left = turns[index] + 1, left - costs[index].turn
    return turns


def check_minutes(minutes: float) -> float:
    """Seconds for measuring; some are reserved for the summary.

    Raises:
        UserError: If none are left.
    """
    if not minutes > 1:
        raise UserError(f"--minutes {minutes:g}: give more than 1, as one minute is reserved for the plots")
    return 60 * (minutes - 1)
