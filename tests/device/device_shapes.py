"""Operations on shapes only: floats are meta tensors, integers and masks have numbers where they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Every tensor in lists, tuples and dictionaries changed; torch's own trees take most of the time of a test."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each(change, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [each(change, part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


BY_SHAPE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""What makes a tensor from no more of another than its shape and dtype."""


def known(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype have numbers where they follow from shapes."""
    return not dtype.is_floating_point and not dtype.is_complex


def of_shapes(func: Any, name: str, args: Any, kwargs: dict[str, Any], made: bool) -> Any:
    """Run an operation; ``made`` says that it takes no tensor."""
    tensors = list(tensors_in((args, kwargs)))
    if made:
        shape = _meta(func, args, dict(kwargs))
        return func(*args, **kwargs) if known(shape.dtype) else shape
    if name in BY_SHAPE and known(kwargs.get("dtype") or args[0].dtype):
        like = torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
        return func(like, *args[1:], **kwargs)
    if not any(t.is_meta for t in tensors):
        out = func(*args, **kwargs)
        # What floats are made of integers has no numbers either: as if it had passed through the device.
        return each(lambda t: t if known(t.dtype) else t.to("meta"), out)
    chosen = CHOICES.get(func._schema.name.partition("::")[2])
    if chosen is not None:
        return chosen(func, args, kwargs)
    return _meta(func, args, kwargs)


def _meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = each(lambda t: t.to("meta"), (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    return func(*args, **kwargs)


def _in_order(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Places along a dimension in their order: a possible outcome of sorting."""
    out = _meta(func, args, kwargs)
    dim = next((a for a in (*args[1:], kwargs.get("dim")) if isinstance(a, int) and not isinstance(a, bool)), -1)
    dim = kwargs.get("dim", -1 if func._schema.name.endswith("topk") else dim)

    def places(t: Tensor) -> Tensor:
        steps = torch.arange(t.shape[dim]).view([-1 if d == dim % t.ndim else 1 for d in range(t.ndim)])
        return steps.expand(t.shape).contiguous()

    return each(lambda t: places(t) if t.dtype == torch.int64 else t, out)


def _first(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Zeros: the first is a possible best."""
    out = _meta(func, args, kwargs)
    return each(lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.dtype == torch.int64 else t, out)


def _flash(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Outputs as the simulated attention without log-sums leaves them: heads of a token side by side."""
    out, *rest = _meta(func, args, kwargs)
    n, heads, length, dim = out.shape
    return (out.new_empty(n, length, heads, dim).transpose(1, 2), *rest)


CHOICES: dict[str, Any] = {
    "_scaled_dot_product_flash_attention": _flash,
    **dict.fromkeys(("sort", "argsort", "topk"), _in_order),
    **dict.fromkeys(("max", "min", "argmax", "argmin"), _first),
}
"""Where places follow from numbers that are not there, and where torch's shapes have another layout."""
