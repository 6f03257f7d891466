"""Whether the compiled kernels run on a device: tested once, against their torch reference implementations."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def use_compiled(x: Tensor) -> bool:
    """Whether tokens on this device go through Triton; gradients need the reference, which autograd knows."""
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return why_not(x.device) is None


def launching_on(device: torch.device) -> AbstractContextManager:
    """Make the device of the tensors the current one, on which Triton launches."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the compiled kernels do not run on a device; None if they do.

    The first call on a CUDA device compiles them and compares a few numbers. A compiler that is missing
    or an output that differs costs speed, never a wrong plan.
    """
    if device.type != "cuda":
        return "they need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        problem = _disagreement(device)
    except Exception as error:  # compilers fail in many ways, and none of them may end a reconstruction
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if problem is not None:
        warnings.warn(f"Triton kernels are not used on {device}: {problem}", RuntimeWarning, stacklevel=3)
    return problem


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """What a kernel is tried in: the answer holds for the process, whatever the settings of the first caller are."""
    with launching_on(device), torch.device("cpu"), torch.autocast(device.type, enabled=False), torch.no_grad():
        yield


def _disagreement(device: torch.device, narrow: torch.dtype = torch.bfloat16) -> str | None:
    """The difference from the reference implementation on a small problem; None if there is none."""
    with alone(device):
        return _compare(device, narrow)


def _compare(device: torch.device, narrow: torch.dtype) -> str | None:
    from geoaccel.kernels.match import best_match, segment_mean
    from geoaccel.kernels.nibbles import decode_groups

    def spread(groups: Tensor) -> Tensor:
        return groups.float().repeat_interleave(32, dim=1)[:, :300]

    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (narrow, 2e-2)):
        a, b = (F.normalize(torch.randn(3, n, 40, generator=generator), dim=-1).to(device, dtype) for n in (70, 90))
        scores = a.double() @ b.double().transpose(1, 2)  # float32 would be TF32 if the caller allows it
        best, where = best_match(a, b)
        if float((scores.gather(2, where[..., None])[..., 0] - scores.amax(-1)).abs().max()) > tolerance:
            return f"the best match differs from torch's in {dtype}"
        if float((best - scores.amax(-1)).abs().max()) > tolerance:
            return f"the similarity differs from torch's in {dtype}"
        counts = torch.tensor([4, 0, 66], device=device)
        starts = counts.cumsum(0) - counts
        members = torch.randperm(70, generator=generator).to(device)
        expected = F.embedding_bag(members, a[0].float(), starts, mode="mean")
        if float((segment_mean(a[0], members, starts, counts).float() - expected).abs().max()) > tolerance:
            return f"means differ from torch's in {dtype}"
        codes = torch.randint(16, (70, 300), generator=generator)
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(device, torch.uint8)
        steps, zeros = torch.rand(2, 70, 10, generator=generator).bfloat16().to(device)
        expected = codes.to(device) * spread(steps) + spread(zeros)
        if float((decode_groups(packed, steps, zeros, 300, 32, dtype).float() / expected - 1).abs().max()) > tolerance:
            return f"decoded weights differ from torch's in {dtype}"
    return None
