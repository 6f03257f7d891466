"""Alternating forwards: methods against the dense model, formats against bfloat16; each run is written at once."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from gpu_journal import Journal, in_short
from gpu_schedule import DENSE, LONG, Clock, Group, seconds_of
from torch import Tensor, nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.eval.bench.bench import Bench, check_size, token_counts
from geoaccel.eval.bench.speed import peak_memory, synchronize
from geoaccel.eval.run.made_by import sitting
from geoaccel.memory import GIB, estimate_bytes
from geoaccel.merging.method import MERGING
from geoaccel.models.layers.block import Block
from geoaccel.slots import Slots, fill_slots

RENDERED = 64
"""Rendered frames per scene; more are repeats, as rendering them would take longer than the forward."""

FORMATS = ("fp8", "w4a16")
TRIES = 2
"""A candidate that ended the process this often is left out."""


class Candidate(Protocol):
    """A candidate for alternating runs."""

    model: nn.Module

    def prepare(self) -> None:
        """Apply the candidate's method to the model."""


@dataclass(frozen=True)
class Settings:
    """Settings of all groups.

    Attributes:
        size: (H, W).
        device, dtype: Device and dtype.
        compiled: Whether blocks are compiled when comparing formats.
    """

    size: tuple[int, int]
    device: str
    dtype: str
    compiled: bool = True

    def bench(self, model: str, frames: int) -> Bench:
        """The benchmark of every method, which loads the model and fills its slots."""
        return Bench(
            model=model,
            methods={name: {} for name in MERGING},
            all_methods=True,
            attention=None,
            heads=None,
            layers=None,
            plan=None,
            size=self.size,
            frames=(frames,),
            scene=0,
            folder=Path(),
            device=self.device,
            dtype=self.dtype,
            repeats=5,
            warmup=1,
        )


def candidates(kind: str) -> tuple[str, ...]:
    """Names of the candidates in a group of this kind."""
    return (DENSE, *(MERGING if kind == "merging" else FORMATS))


@torch.inference_mode()
def measure(group: Group, turns: int, settings: Settings, journal: Journal, clock: Clock) -> None:
    """Run the missing rounds of a group, while there is time.

    Candidates alternate. The first run of each in a process is a warm-up, unless it would take long. Failures are
    recorded, too, and not tried again.
    """
    bench = settings.bench(group.model, group.frames)
    try:
        found = KINDS[group.kind](bench, settings)
        rendered = bench.photographs(min(group.frames, RENDERED), settings.size)
        images = rendered.repeat(1, -(-group.frames // RENDERED), 1, 1, 1)[:, : group.frames]
    except UserError:
        raise
    except Exception as error:  # no failure here may end the whole run
        for name in group.candidates:
            journal.write("failed", **group.key, candidate=name, why=in_short(error))
        return
    for name in group.candidates:
        if name not in found and not journal.of("left_out", **group.key, candidate=name):
            journal.write("left_out", **group.key, candidate=name, why="it cannot act on this model")
    runner = _Runner(group, settings, journal, clock, images)
    for turn in range(turns):
        for name, candidate in found.items():
            done = {line["turn"] for line in journal.of("run", **group.key, candidate=name)}
            if turn not in done and not runner.once(name, candidate, turn):
                return


class _Runner:
    """Runs of one group in this process."""

    def __init__(self, group: Group, settings: Settings, journal: Journal, clock: Clock, images: Tensor) -> None:
        self.group, self.settings, self.journal, self.clock = group, settings, journal, clock
        self.images = images
        self.warm: set[str] = set()

    def once(self, name: str, candidate: Candidate, turn: int) -> bool:
        """One run of a candidate; False if there is no time left for it."""
        key = {**self.group.key, "candidate": name}
        if self.journal.of("failed", **key):
            return True
        expected = seconds_of(self.journal, self.group, name, self.settings.size, self.settings.device)
        first = name not in self.warm and expected < LONG
        if (1 + first) * expected > self.clock.left():
            self.journal.write("cut", **key, turn=turn, expected_s=round(expected, 1))
            return False
        ended = len(self.journal.of("begun", **key)) - len(self.journal.of("went", **key))
        if ended >= TRIES:
            self.journal.write("failed", **key, why=f"it ended the process {ended} times")
            return True
        if name not in self.warm:
            self.journal.write("begun", **key)
        try:
            candidate.prepare()
            if first:
                candidate.model(self.images)
            found = self._timed(candidate.model)
        except Exception as error:  # compilers fail in many ways, and not all are a RuntimeError
            self.journal.write("failed", **key, why=in_short(error))
            # After a kernel fault every call on the device fails: the process ends here, and a new one resumes.
            synchronize(self.settings.device)
        else:
            self.journal.write("run", **key, turn=turn, **found, sitting=sitting())
        if name not in self.warm:
            self.journal.write("went", **key)
        self.warm.add(name)
        _tidy(self.settings.device)
        return True

    def _timed(self, model: nn.Module) -> dict[str, Any]:
        """Milliseconds, and memory: measured and estimated."""
        device = self.settings.device
        own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + self.images.nbytes
        needed = estimate_bytes(model, frames=self.group.frames, size=self.settings.size)
        if device.startswith("cuda"):
            needed -= self.images.nbytes  # which it counts there
        before = _in_use(device)
        with peak_memory(device) as peak:
            synchronize(device)
            began = time.perf_counter()
            model(self.images)
            synchronize(device)
            ms = 1000 * (time.perf_counter() - began)
        return {
            "ms": round(ms, 3),
            "peak_gib": round((peak[0] - before + own) / GIB, 4),
            "predicted_gib": round((needed + own) / GIB, 4),
            **{name: round(value, 4) for name, value in token_counts(model).items()},
        }


class _Merged:
    """A model with one method in its slots, or the dense one."""

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        self.model, self.slots = model, slots

    def prepare(self) -> None:
        fill_slots(self.slots)


class _Own:
    """A separate model with the same weights in another format."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prepare(self) -> None:
        """It is what it is."""


def _merging(bench: Bench, settings: Settings) -> dict[str, Candidate]:
    """The dense model and every method that can act on it, on the same weights."""
    model = bench.load()
    check_size(settings.size, model)
    return {name: _Merged(model, slots) for name, slots in bench.slots(model).items()}


def _quantization(bench: Bench, settings: Settings) -> dict[str, Candidate]:
    """The model in its dtype and in every format, each with the same blocks compiled."""
    models = {DENSE: bench.load()}
    check_size(settings.size, models[DENSE])
    for name in FORMATS:
        models[name] = geoaccel.accelerate(bench.load(), quantization=name)
    for model in models.values() if settings.compiled else ():
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
    return {name: _Own(model) for name, model in models.items()}


KINDS = {"merging": _merging, "quantization": _quantization}


def _in_use(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def _tidy(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
