"""Whether a processor is faster in bfloat16 than in float32: measured once, in about a second, and cached.

Processors with matrix units for bfloat16 (AMX) are several times as fast; others convert every number back and forth
and are slower. Only a measurement shows which: CPU flags list instructions, not how a library uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel import measured

VERSION = 1
"""Version of the probe."""

LEAST_GAIN = 1.25
"""A smaller gain does not justify bfloat16's lower precision."""

WIDTH, HEADS = 1024, 16
TOKENS_A_THREAD, MOST_TOKENS = 128, 1024
SECONDS, MOST_ROUNDS = 0.6, 20
"""Rounds of both types run until this much time has passed; at least two, and the first does not count."""

_KNOWN: dict[tuple[Any, ...], float] = {}


def gain(machine: Mapping[str, Any], *, ask: bool = True) -> float | None:
    """Time of a transformer block in float32 over that in bfloat16, on the CPU.

    Args:
        machine: From :func:`geoaccel.runtime.machine`; key of the cached result.
        ask: Measure if it is not known.

    Returns:
        None if it is not known and is not, or cannot be, measured.
    """
    if measured.built_in_only() or torch.compiler.is_compiling():
        return None
    of = {"version": VERSION, "torch": torch.__version__, **machine}
    key = tuple(of.items())
    if key not in _KNOWN:
        found = (measured.read("bfloat16", of) or {}).get("gain")
        if not isinstance(found, float) or not isfinite(found) or found <= 0:
            if not ask or not measured.can_measure(torch.device("cpu")):
                return None
            found = measure()
            measured.write("bfloat16", of, gain=found)
        _KNOWN[key] = found
    return _KNOWN[key]


@torch.inference_mode()
def measure() -> float:
    """Time a block in both types alternately; the fastest run of each counts, to ignore other load on the machine."""
    calls = {dtype: _block(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(calls, float("inf"))
    began = time.perf_counter()
    with torch.autocast("cpu", enabled=False):
        for turn in range(MOST_ROUNDS):
            for dtype, call in calls.items():
                start = time.perf_counter()
                call()
                best[dtype] = min(best[dtype], time.perf_counter() - start) if turn else best[dtype]
            if turn and time.perf_counter() - began > SECONDS:
                break
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


def _block(dtype: torch.dtype) -> Callable[[], Tensor]:
    """A transformer block with attention, on random numbers of its own generator."""
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = min(MOST_TOKENS, TOKENS_A_THREAD * torch.get_num_threads())

    def random(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")).to(dtype)

    shapes = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
    qkv, out, up, down = (random(*shape) for shape in shapes)
    x = random(1, tokens, WIDTH)

    def call() -> Tensor:
        heads = F.linear(F.layer_norm(x, (WIDTH,)), qkv).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = x + F.linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), out)
        return y + F.linear(F.gelu(F.linear(F.layer_norm(y, (WIDTH,)), up)), down)

    return call
