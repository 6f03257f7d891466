"""Operations as CUDA does them, with numbers of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSOR = torch.tensor


class WrongOnCuda(RuntimeError):
    """What CUDA refuses, or would get wrong."""


def host_tensor(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which makes a tensor on the host first."""
    cuda = device is not None and torch.device(device).type == "cuda"
    made = TENSOR(data, dtype=dtype, device="cpu" if cuda else device, **options)
    return made.to(device) if cuda else made


def tf32(t: Tensor) -> Tensor:
    """Ten bits of mantissa, as the tensor cores read them."""
    return (t.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32) if t.dtype == torch.float32 else t


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any = None, scale: Any = None, out_dtype: Any = None,
    use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """`torch._scaled_mm`, which a CPU has for few shapes."""
    if a.shape[1] % 16 or b.shape[1] % 16 or b.stride(0) != 1:
        raise WrongOnCuda("_scaled_mm takes sides that are multiples of 16, and the second matrix by columns")
    out = (a.float() * scale_a) @ (b.float() * scale_b)
    return (out if bias is None else out + bias.float()).to(out_dtype)
