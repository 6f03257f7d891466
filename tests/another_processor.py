"""Runs tests as on a processor that sums in another order: ``pytest --processor 1``.

Which kernel multiplies two matrices, how it splits the sum and over how many threads, depends on the processor, on the
library and on the shapes; no machine has all of them. Here the sums of torch get the error that another order would
have left: for K products of a row a and a column b a standard deviation of 0.2 x epsilon x ``|a| |b|``. Partial sums of
terms with random signs grow like a random walk, and each is rounded once: 1 / sqrt(12) for the rounding, 1 / sqrt(2)
for the mean over the walk. Narrow types sum in float32 and are rounded once at the end, as in matrix units.

The error is chosen by the number that was given, the operation, and the shapes and strides, as kernels are: the same
call gives the same bits again; the same row in a batch of another size does not.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ORDER = 0.2
NARROW = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
MEANS_OF_ROWS = ("native_layer_norm", "_softmax", "_scaled_dot_product_flash_attention_for_cpu")


class AnotherProcessor(TorchDispatchMode):
    """Sums in an order of its own.

    Args:
        seed: Which processor.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        known = name.rstrip("_") in (*PRODUCTS, *MEANS_OF_ROWS, "sum", "mean", "convolution")
        if not known or any(not t.numel() or not t.is_floating_point() or t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        if name.endswith("_"):  # in place
            return args[0].copy_(self.sum(name[:-1], getattr(torch.ops.aten, name[:-1]).default, args, kwargs, tensors))
        return self.sum(name, func, args, kwargs, tensors)

    def sum(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """What the operation gives, off by as much as another order of its sums might be."""
        expected = kwargs.get("dtype") or tensors[0].dtype
        if expected in NARROW or tensors[0].dtype in NARROW:
            args = tuple(_wide(arg) for arg in args)
            kwargs = {key: torch.float32 if key == "dtype" else _wide(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if out.is_floating_point():
            key = (self.seed, name, *((tuple(t.shape), t.stride()) for t in tensors))
            error = _pattern(zlib.crc32(repr(key).encode()), tuple(out.shape)).to(out.dtype)
            moved = out + ORDER * torch.finfo(out.dtype).eps * rounded(name, out, args) * error
            out = torch.where(moved.isfinite(), moved, out).to(expected)
        return (out, *result[1:]) if isinstance(result, tuple) else out


def rounded(name: str, out: Tensor, args: tuple[Any, ...]) -> Tensor:
    """What the rounding of every sum is in proportion to: the norms of its terms."""
    norm = torch.linalg.vector_norm
    if name in PRODUCTS:
        a, b = args[-2:]
        return norm(a, dim=-1, keepdim=True) * norm(b, dim=-2, keepdim=True)
    if name == "convolution":
        x, weight, transposed = args[0], args[1], args[6]
        rest = [dim for dim in range(weight.ndim) if dim != int(transposed)]
        taps = norm(weight, dim=rest) * math.sqrt(weight[0].numel()) * x.square().mean().sqrt()
        return taps.repeat(out.shape[1] // len(taps)).view(1, -1, *[1] * (out.ndim - 2))
    if name in ("sum", "mean"):
        x = args[0]
        dims = args[1] if len(args) > 1 and args[1] else list(range(x.ndim))
        terms = norm(x, dim=dims, keepdim=out.ndim == x.ndim)
        return terms if name == "sum" else terms * (out.numel() / x.numel())
    return out.abs()


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


@functools.lru_cache(maxsize=512)
def _pattern(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)
