"""Attention whose two products take e4m3 codes: queries with keys, and weights with values.

    codes and scales    a token's query and key share one scale over their D channels each; a channel's values share one
                        over the keys of their sequence
    logits              codes' product * query's scale * key's scale * D^-1/2, plus the bias of the key; float32
    weights             exp(logit - highest so far), times 256, rounded to e4m3
    output              sum of weight * value's code, over the sum of the rounded weights, * value's scale; float32

Keys come in tiles of ``KEYS``, and what was summed shrinks where a tile raises the highest logit, so that nothing
quadratic is ever stored. Scales of queries and keys belong to tokens because they then need no pass over the sequence,
the largest channel of each token is exact, and a NaN query stays alone; values have theirs outside the sum. On the two
small models that come with the package, scales of whole heads for queries and keys gave errors a fifth larger. Dividing
by the sum of the rounded weights makes every output a mean of values: weights below 2^-18 of the highest are lost, and
the others take their share.

On NVIDIA from compute capability 8.9 on this is one Triton kernel (``geoaccel.kernels.fp8_flash``). Everywhere but on
CUDA the same numbers come from rounding and multiplying in float32, which is slower than attention without FP8.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from geoaccel.errors import UnsupportedHere, UserError
from geoaccel.kernels.choice import alone, launching_on
from geoaccel.kernels.fp8_reference import Operands, emulate, round_operands

FIRST_CAPABILITY = (8, 9)


def fp8(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    bias: Tensor | None,  # [n or 1, 1, N, M], the same for every query
) -> Tensor:  # [n, A, N, D]
    """Attention with queries, keys, values and weights rounded to e4m3; see the module for how.

    On tokens of independent normal numbers the error is five percent of the output, in ``vggt-mini`` and ``pi3-mini``
    two.

    Raises:
        ValueError: If gradients are wanted, if the bias is not one of keys alone, or if a token is NaN or infinite; the
            last on a CPU only, as looking would make a GPU wait. There the outputs concerned are NaN.
        UnsupportedHere: On a CUDA device where the Triton kernel does not run.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UserError("attention='fp8' has no gradients; call the model under torch.no_grad(), or choose 'sdpa'")
    why = missing_kernel(q.device.index) if q.is_cuda else None
    if why is not None:
        raise UnsupportedHere(f"attention='fp8' does not run on {q.device}: {why}; choose 'sdpa'")
    operands = round_operands(q, k, v, _of_keys(bias))
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _refuse_not_finite(operands)
    if not q.is_cuda:
        return emulate(operands).to(q.dtype)
    from geoaccel.kernels.fp8_flash import flash

    with launching_on(q.device):
        return flash(operands, q.dtype)


def runs_as(device: torch.device) -> str:
    """How the kernel runs on a supported device."""
    return "FP8 products in Triton" if device.type == "cuda" else "emulated in float32, slower than sdpa"


def missing_kernel(index: int | None) -> str | None:
    """Why the Triton kernel does not run on a CUDA device; None if it does. Tested once per device."""
    return _try_kernel(torch.cuda.current_device() if index is None else index)


# Same as torch.compiler.assume_constant_result, which would import the compiler with the package.
missing_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _try_kernel(index: int) -> str | None:
    """Run a small problem and compare it with the emulation."""
    device = torch.device("cuda", index)
    if torch.version.hip is not None:
        return "FP8 products in Triton are for NVIDIA"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"FP8 products need compute capability 8.9 or higher, this is {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return _disagreement(device)
    except Exception as problem:  # compilers fail in many ways, and each is a reason
        first = str(problem).strip().splitlines()[:1]
        return f"the Triton kernel fails with {type(problem).__name__}: {first[0] if first else 'no message'}"


def _disagreement(device: torch.device, *, native: bool = True) -> str | None:
    """The difference from the emulation on a small problem; None if there is none."""
    with alone(device):
        return _compare(device, native)


def _compare(device: torch.device, native: bool) -> str | None:
    from geoaccel.kernels.fp8_flash import flash

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, generator=generator).to(device) for tokens in (150, 200, 200))
    operands = round_operands(q, k, v, torch.rand(2, 200, generator=generator).to(device))
    expected = emulate(operands)  # TF32 holds every number of its products
    error = float((flash(operands, torch.float32, native=native) - expected).norm() / expected.norm())
    # Hardware sums of a tile are a little coarser than float32, which moves a few weights to the next code.
    return None if error < 0.01 else f"the Triton kernel is off by {error:.0%}"


def _of_keys(bias: Tensor | None) -> Tensor | None:  # [n or 1, M]
    """The bias row, which is the same for every query."""
    if bias is None:
        return None
    if bias.ndim != 4 or bias.shape[1] != 1 or (bias.shape[2] > 1 and bias.stride(2) != 0):
        raise ValueError(
            "attention='fp8' needs a bias that is the same for all heads and queries, [n, 1, N, M] expanded along N; "
            f"got shape {list(bias.shape)} with strides {list(bias.stride())}"
        )
    return bias[:, 0, 0]


def _refuse_not_finite(x: Operands) -> None:
    for what, scale in (("query", x.q_scale), ("key", x.k_scale), ("value", x.v_scale)):
        if not scale.isfinite().all():
            sequence, head = (~scale.isfinite()).nonzero()[0, :2].tolist()
            raise UserError(
                f"attention='fp8': a {what} of head {head} in sequence {sequence} is NaN or infinite; check the images "
                "for such values, then for an overflow in float16"
            )
