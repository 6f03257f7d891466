"""Estimates the memory that a forward needs before it starts, and chooses a plan that fits.

A network reports how much it needs (``activation_bytes``), and its plans that need less (``memory_plans``). The first
plan that fits is used; if none does, the forward is refused.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geoaccel import host_memory
from geoaccel.errors import UserError
from geoaccel.memory_plan import MemoryPlan
from geoaccel.model_lock import locked

GIB = 2**30
HEADROOM = 1.15
"""Margin for kernels, allocator and libraries on top of what is counted."""

CUDA_CONTEXT = GIB // 2
"""Memory that CUDA itself takes on a device, approximately."""

CPU_PROCESS = 350_000_000
"""What Python and its libraries take of a process that reconstructs on a CPU, about."""

PIXEL_BYTES = 5
"""Per colour channel of a pixel while images are read: decoded, and in float32."""

UNITS = {"gb": 10**9, "mb": 10**6, "gib": 2**30, "mib": 2**20}


@dataclass(frozen=True)
class Limit:
    """Memory limit of a forward.

    Attributes:
        max_bytes: On the device, weights included; on a CPU for the process. None: what is free.
        device: Where the model will run; None: where it is.
        heads: Heads that will run; None: all.
    """

    max_bytes: int | None = None
    device: torch.device | None = None
    heads: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        max_memory: str | int | None,
        device: torch.device | str | None = None,
        heads: Sequence[str] | None = None,
    ) -> Limit | None:
        """From user input; None if nothing was given.

        Raises:
            UserError: For an invalid size, or a limit of zero.
        """
        if max_memory is None and device is None:
            return None
        size = None if max_memory is None else read_size(max_memory)
        there = None if device is None else torch.device(device)
        return cls(size, there, None if heads is None else tuple(heads))

    def room(self, device: torch.device, free: int) -> int:
        """Bytes left for a forward, of those that are free."""
        if self.max_bytes is None:
            return free
        return min(free, int((self.max_bytes - reserved(device.type) - in_use(device)) / HEADROOM))


def read_size(given: str | int, option: str = "max_memory") -> int:
    """Bytes from ``24GB``, ``512 MiB``, or a number of bytes, a million or more.

    Raises:
        UserError: Saying what is allowed.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(given).lower())
    number = isinstance(given, int) and not isinstance(given, bool) and given >= UNITS["mb"]  # 16 is not meant as bytes
    if match is None or (match[2] not in UNITS and not number):
        raise UserError(f"{option} {given} is not a size; give a number with a unit, such as 16GB")
    size = int(float(match[1]) * UNITS.get(match[2], 1))
    if size <= 0:
        raise UserError(f"{option} 0 is too small for any network; give more")
    return size


def free_bytes(device: torch.device) -> int:
    """Memory available to a forward: what the process can still allocate on a device, less a margin."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = host_memory.available()
    return int(free / HEADROOM)


def host_room(device: torch.device) -> float:
    """Bytes that offloaded layers may take on the host; unlimited on a CPU, where nothing is offloaded."""
    return math.inf if device.type == "cpu" else free_bytes(torch.device("cpu"))


def reserved(device: str) -> int:
    """Memory that a kind of device takes before any tensor exists."""
    return CUDA_CONTEXT if device == "cuda" else 0


def in_use(device: torch.device) -> int:
    """Memory of this process on a device."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers: quantized weights are buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def estimate_bytes(
    model: nn.Module,
    *,
    frames: int,
    size: tuple[int, int],
    heads: Sequence[str] | None = None,
    plan: MemoryPlan | None = None,
    device: torch.device | None = None,
) -> int:
    """Memory that a forward over S frames of H x W needs in addition to what is in use now.

    Includes weights that are not on the device yet; on a CPU those still in the checkpoint file, which is memory-mapped
    and read on first use; for a network on the meta device all of them.

    Args:
        model: The network, with its methods.
        frames, size: S and (H, W).
        heads: Heads that run; all by default.
        plan: Memory plan; None: everything at once.
        device: Where it will run; where it is by default.
    """
    own = next(model.parameters()).device
    there = own if device is None else device
    needed = activation_bytes(model, frames, size, there.type, heads=heads, plan=plan)
    weights = weight_bytes(model)
    if own.type == "meta" or own.type != there.type:
        needed += weights
    elif own.type == "cpu":
        needed += max(0, weights - in_use(own))
    return round(needed)


def activation_bytes(
    model: nn.Module,
    frames: int,
    size: tuple[int, int],
    device: str,
    *,
    heads: Sequence[str] | None = None,
    plan: MemoryPlan | None = None,
) -> int:
    """The network's own estimate for a forward; networks without plans ignore heads and device."""
    network: Any = model
    if not network.memory_plans(device):
        return network.activation_bytes(frames, size)
    return network.activation_bytes(frames, size, heads=heads, plan=plan, device=device)


def check_memory(
    model: nn.Module,
    *,
    frames: int,
    size: tuple[int, int],
    unread: bool = False,
    limit: Limit | None = None,
    planned: bool = True,
) -> MemoryPlan | None:
    """Choose a plan with which a forward fits into memory; refuse a forward that cannot.

    Args:
        model: The network, with its methods.
        frames: S.
        size: (H, W).
        unread: The images are not in memory yet.
        limit: Requested limit; None: what is free where the model is.
        planned: Whether the caller follows a plan; otherwise everything at once has to fit.

    Returns:
        The plan; None: everything at once.

    Raises:
        UserError: With the memory needed and free, and how many frames would fit.
    """
    limit = limit or Limit()
    device = limit.device or next(model.parameters()).device
    pixels = PIXEL_BYTES * 3 * size[0] * size[1] if unread and device.type == "cpu" else 0
    free = free_bytes(device)
    room = limit.room(device, free)
    host = host_room(device)
    choice = choose(model, frames, size, limit, room - frames * pixels, host=host, planned=planned)
    if choice.fits:
        return choice.plan

    def needed_for(count: int) -> int:
        return choice.needed_for(count) + count * pixels

    least = needed_for(frames)
    fitting = bisect.bisect_right(range(1, frames), room, key=needed_for)
    narrow = "" if next(model.parameters()).dtype == torch.bfloat16 else ", or halve it with --dtype bfloat16"
    advice = f"at most {fitting} frames fit (--max-frames {fitting})" if fitting >= 2 else "use a smaller model"
    words = f"{readable(room)} are free"
    if limit.max_bytes is not None and least <= free:
        words = f"{limit.max_bytes / 1e9:.4g} GB leave {readable(max(0, room))}"
        enough = HEADROOM * least + reserved(device.type) + in_use(device)
        advice += f", or give more memory (--max-memory {_rounded_up(enough)})"
    raise UserError(
        f"{frames} frames of {size[0]} x {size[1]} pixels need about {readable(least)} on {device.type}, {words}; "
        f"{advice}{narrow}"
    )


@dataclass(frozen=True)
class Choice:
    """The plan for a forward, and whether it fits.

    Attributes:
        plan: The first that fits, else the one that needs least; None: everything at once.
        needed: Bytes that it needs.
        fits: Whether that fits.
        needed_for: Bytes needed for another number of frames.
    """

    plan: MemoryPlan | None
    needed: int
    fits: bool
    needed_for: Callable[[int], int]


def choose(
    model: nn.Module,
    frames: int,
    size: tuple[int, int],
    limit: Limit,
    room: int,
    *,
    host: float = math.inf,
    planned: bool = True,
) -> Choice:
    """The plan for a forward.

    Args:
        model, frames, size, limit, planned: As of :func:`check_memory`.
        room: Bytes available on the device.
        host: Bytes available on the host for offloaded layers.
    """
    network: Any = model
    device = limit.device or next(model.parameters()).device
    plans: list[MemoryPlan | None] = [None]
    if planned and getattr(model, "sharing", None) is None:
        known = network.memory_plans(device.type)
        plans += [
            plan
            for plan in known
            if not plan.host_layers or network.host_bytes(frames, size, plan, heads=limit.heads) <= host
        ]
    found: list[Choice] = []
    for plan in plans:
        needed_for = functools.partial(_estimate, model, size, limit.heads, plan, device)
        needed = needed_for(frames)
        found.append(Choice(plan, needed, needed <= room, needed_for))
    return next((choice for choice in found if choice.fits), min(found, key=lambda choice: choice.needed))


def _estimate(
    model: nn.Module,
    size: tuple[int, int],
    heads: Sequence[str] | None,
    plan: MemoryPlan | None,
    device: torch.device,
    frames: int,
) -> int:
    return estimate_bytes(model, frames=frames, size=size, heads=heads, plan=plan, device=device)


def readable(size: float) -> str:
    """A size in GiB, or in MB where little would be left of it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1e6:.4g} MB"


def _rounded_up(size: float) -> str:
    """A sufficient limit, rounded up to two or three digits."""
    megabytes = 1.02 * size / 1e6
    step = 10 ** max(0, math.floor(math.log10(megabytes)) - 1)
    return f"{math.ceil(megabytes / step) * step}MB"


@contextmanager
def planned(model: nn.Module, plan: MemoryPlan | None) -> Iterator[None]:
    """Run a model without gradients under one of its own plans (``model.memory_plans``); None: no plan.

    Other threads that plan the same model wait.
    """
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "memory_plan")]
    if plan is not None and not owners:
        raise UserError(f"{type(model).__name__} has no memory plans; give max_memory=None")
    with locked(model):
        before = [owner.memory_plan for owner in owners]
        for owner in owners:
            owner.memory_plan = plan
        try:
            yield
        finally:
            for owner, own in zip(owners, before, strict=True):
                owner.memory_plan = own
