"""Fused kernels: whether one runs on a device, tested once against its reference implementation.

    run = fused("add_norm", x)
    if run is not None:
        return run(x, y, gamma, weight, bias, eps)

Each is tried by itself, so that one that fails takes no other with it. ``NAMES`` says where they are; the twins of the
same names are in :mod:`geoaccel.kernels.twins`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoaccel.kernels import twins
from geoaccel.kernels.choice import alone, launching_on
from geoaccel.kernels.e4m3 import E4M3

Kernel = Callable[..., Any]

NAMES = {
    "rotate_heads": ("geoaccel.kernels.heads", 256),
    "quantize_rows": ("geoaccel.kernels.rows", 16_384),
    "add_norm": ("geoaccel.kernels.rows", 16_384),
    "match_blocks": ("geoaccel.kernels.blocks", 256),
    "deviation": ("geoaccel.kernels.blocks", 256),
    "join": ("geoaccel.kernels.joins", 256),
    "pick": ("geoaccel.kernels.picks", 256),
}
"""The module of each, and the most channels, the last dimension of its first input, that a program of it holds."""


def fused(name: str, x: Tensor) -> Kernel | None:
    """The kernel where it runs; None where the operations have to: elsewhere than on CUDA, with more channels than a
    program holds, where a gradient is wanted, and in what is being compiled, where they are fused anyway.
    """
    if x.device.type != "cuda" or x.shape[-1] > NAMES[name][1] or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    return None if why_not(name, x.device) is not None else _on(x.device, load(name))


def load(name: str) -> Kernel:
    """The function that launches a kernel."""
    return getattr(importlib.import_module(NAMES[name][0]), name)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a kernel does not run on a device; None if it does. Tested once, whatever the caller's settings are."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _try(name, torch.device(device.type, index) if index is not None else device)


@functools.cache
def _try(name: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        with alone(device):
            problem = disagreement(name, _on(device, load(name)), device)
    except Exception as error:  # compilers fail in many ways, and none of them may end a reconstruction
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if problem is not None:
        warnings.warn(f"the Triton kernel {name} is not used on {device}: {problem}", RuntimeWarning, stacklevel=4)
    return problem


def _on(device: torch.device, kernel: Kernel) -> Kernel:
    """Launch on the device of the tensors: Triton uses the current one."""

    @functools.wraps(kernel)
    def launch(*inputs: Any, **settings: Any) -> Any:
        with launching_on(device):
            return kernel(*inputs, **settings)

    return launch


def disagreement(name: str, kernel: Kernel, device: torch.device, narrow: torch.dtype = torch.bfloat16) -> str | None:
    """The difference from the reference implementation on a small problem; None if there is none.

    Args:
        name: One of ``NAMES``.
        kernel: The function to try.
        device: Where.
        narrow: The dtype that is tried besides float32.
    """
    for dtype, tolerance in ((torch.float32, 1e-4), (narrow, 2e-2)):
        error = CHECKS[name](kernel, _Examples(device, dtype))
        if not error <= tolerance:
            return f"off by {error:.1e} from torch in {dtype}"
    return None


class _Examples:
    """Random tensors, the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def numbers(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32)
        return drawn.to(self.device, self.dtype)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device="cpu").to(self.device)


def _check_rotate_heads(kernel: Kernel, made: _Examples) -> float:
    qkv, norms = made.numbers(2, 14, 3, 2, 48), [(made.numbers(48), made.numbers(48)) for _ in range(2)]
    angles = made.numbers(7, 2, 12).float()
    rope = (angles.cos().to(made.dtype), angles.sin().to(made.dtype))
    errors = []
    cases: list[Any] = [(*norms, 1e-5, rope), (None, None, 1e-5, rope), (*norms, 1e-5, None)]
    for given in cases:
        pairs = zip(kernel(qkv, *given), twins.rotate_heads(qkv, *given), strict=True)
        errors += [twins.difference(found, expected) for found, expected in pairs]
    return max(errors)


def _check_quantize_rows(kernel: Kernel, made: _Examples) -> float:
    """Of the numbers behind the codes; a number at the edge between two codes may fall on either side."""
    errors = []
    for gelu in (False, True):
        x = made.numbers(9, 300)
        x[3] = 0
        codes, scale = kernel(x, gelu)
        expected, wanted = twins.quantize_rows(x, gelu)
        errors.append(twins.difference(scale, wanted))
        # Codes are decoded by torch.
        numbers = codes.float() * scale if codes.dtype == E4M3 else codes * scale
        errors.append(twins.difference(numbers, expected.float() * wanted) / 100)
    return max(errors)


def _check_add_norm(kernel: Kernel, made: _Examples) -> float:
    x, y, gamma, weight, bias = (made.numbers(*shape) for shape in ((9, 300), (9, 300), (300,), (300,), (300,)))
    errors = []
    for factor in (gamma, None):
        pairs = zip(
            kernel(x, y, factor, weight, bias, 1e-5), twins.add_norm(x, y, factor, weight, bias, 1e-5), strict=True
        )
        errors += [twins.difference(found, expected) for found, expected in pairs]
    return max(errors)


def _check_match_blocks(kernel: Kernel, made: _Examples) -> float:
    """How much less alike than the best what was found is."""
    x = made.numbers(2, 300, 2, 40).transpose(1, 2)
    sources, targets = made.whole(300, 2, 150), made.whole(300, 2, 70)
    scores = twins.block_scores(x, sources, targets, 1e-6)
    found = kernel(x, sources, targets, 1e-6)
    return float((scores.amax(-1) - scores.gather(-1, found[..., None])[..., 0]).max())


def _check_deviation(kernel: Kernel, made: _Examples) -> float:
    x, merged = made.numbers(2, 100, 3, 40).transpose(1, 2), made.numbers(2, 3, 11, 40)
    group_of = made.whole(11, 2, 3, 100)
    return twins.difference(kernel(x, group_of, merged), twins.deviation(x, group_of, merged))


def _check_join(kernel: Kernel, made: _Examples) -> float:
    """One of them as flash attention gives it, heads beside each other."""
    first, second = made.numbers(2, 3, 70, 40), made.numbers(2, 70, 3, 40).transpose(1, 2)
    sums = [made.numbers(2, 3, 70).float() for _ in range(2)]
    pairs = [(first.clone(), sums[0].clone()) for _ in range(2)]
    for run, (own, total) in zip((kernel, twins.join), pairs, strict=True):
        run(own, total, second, sums[1], 1.5)
    return max(twins.difference(found, expected) for found, expected in zip(*pairs, strict=True))


def _check_pick(kernel: Kernel, made: _Examples) -> float:
    """Keys head by head, values beside each other as projections leave them; one choice for all heads, and one each."""
    k, v = made.numbers(2, 3, 90, 40), made.numbers(2, 90, 3, 40).transpose(1, 2)
    errors = []
    for heads in (1, 3):
        index = made.whole(90, heads, 70)
        pairs = zip(kernel(k, v, index), twins.pick(k, v, index), strict=True)
        errors += [twins.difference(found, expected) for found, expected in pairs]
    return max(errors)


CHECKS: dict[str, Callable[[Kernel, _Examples], float]] = {
    "rotate_heads": _check_rotate_heads,
    "quantize_rows": _check_quantize_rows,
    "add_norm": _check_add_norm,
    "match_blocks": _check_match_blocks,
    "deviation": _check_deviation,
    "join": _check_join,
    "pick": _check_pick,
}
