"""Every kernel against its torch reference: whether it runs, its error, and the time of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_fused import fused_calls
from gpu_journal import Journal, in_short
from torch import Tensor

from geoaccel.attention_kernels import KERNELS
from geoaccel.eval.bench.speed import synchronize
from geoaccel.kernels import choice, fused
from geoaccel.plan import MergePlan
from geoaccel.quantization import W4A16
from geoaccel.similarity import best_match

RUNS = 5

Probe = Callable[[], Tensor]


def probe_kernels(journal: Journal, device: str, dtype: str, tokens: int) -> None:
    """A line for every kernel that has none yet; for a failing one, with the reason.

    Args:
        journal: Output.
        device, dtype: Device and dtype.
        tokens: Tokens of the test problems.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    calls = fused_calls(where, kind, tokens)
    problems = _problems(where, kind, tokens) | {name: (call, _without(call)) for name, call in calls.items()}
    for name, (kernel, twin) in problems.items():
        if not journal.of("kernel", name=name):
            why = fused.why_not(name, where) if name in calls and where.type == "cuda" else choice.why_not(where)
            journal.write("kernel", name=name, **_compared(kernel, twin, device), not_compiled=why)
            synchronize(device)  # after a kernel fault the process ends here, and a new one resumes


def _problems(device: torch.device, dtype: torch.dtype, tokens: int) -> dict[str, tuple[Probe, Probe]]:
    """By name, a call of the kernel and one of its reference."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = (random(1, 16, tokens, 64) for _ in range(3))
    x = F.normalize(random(1, tokens, 1024), dim=-1)
    owner = torch.randint(tokens // 3, (1, tokens), generator=generator).to(device)
    owner[:, : tokens // 3] = torch.arange(tokens // 3, device=device)
    linear = W4A16().quantize(torch.nn.Linear(1024, 1024)).to(device)

    def matched() -> Tensor:
        return best_match(x, x[:, : tokens // 4])[0]

    def merged() -> Tensor:
        return MergePlan(owner[0], tokens // 3).merge(x[0])

    def decoded() -> Tensor:
        return linear.dequantize(dtype)

    def attends(name: str) -> Probe:
        return lambda: KERNELS[name](q, k, v, None)

    calls = {"best match": matched, "segment means": merged, "decoded 4-bit weights": decoded}
    problems = {name: (call, _without(call)) for name, call in calls.items()}
    return problems | {f"attention {name}": (attends(name), attends("matmul")) for name in KERNELS if name != "matmul"}


def _without(call: Probe) -> Probe:
    def run() -> Tensor:
        with compiled_kernels_off():
            return call()

    return run


def _compared(kernel: Probe, twin: Probe, device: str) -> dict[str, Any]:
    """Relative difference and milliseconds of both, or why it does not run."""
    try:
        found, expected = kernel().float(), twin().float()
        difference = float((found - expected).norm() / expected.norm())
        times = [_milliseconds(call, device) for call in (kernel, twin)]
    except Exception as error:  # compilers fail in many ways
        return {"runs": False, "why": in_short(error)}
    return {"runs": True, "difference": difference, "ms": times[0], "twin_ms": times[1]}


def _milliseconds(call: Probe, device: str) -> float:
    """Milliseconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(RUNS):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return round(1000 * best, 4)


@contextmanager
def compiled_kernels_off() -> Iterator[None]:
    """Run every operation in torch, also on a GPU."""
    with ExitStack() as stack:
        for module in (choice, fused):
            stack.enter_context(mock.patch.object(module, "why_not", return_value="switched off"))
        yield
