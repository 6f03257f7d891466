"""Operations on shapes only: floating-point tensors are meta tensors, integers and masks have numbers where they can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

BY_SHAPE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""What makes a tensor from no more of another than its shape and dtype."""


def known(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype have numbers where they follow from shapes."""
    return not dtype.is_floating_point and not dtype.is_complex


def of_shapes(func: Any, name: str, args: Any, kwargs: dict[str, Any], made: bool) -> Any:
    """Run an operation; ``made`` says that it takes no tensor."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if made:
        shape = _meta(func, args, dict(kwargs))
        return func(*args, **kwargs) if known(shape.dtype) else shape
    if name in BY_SHAPE and known(kwargs.get("dtype") or args[0].dtype):
        like = torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
        return func(like, *args[1:], **kwargs)
    if not any(t.is_meta for t in tensors):
        out = func(*args, **kwargs)
        # What floats are made of integers has no numbers either: as if it had passed through the device.
        return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) and not known(t.dtype) else t, out)
    chosen = CHOICES.get(func._schema.name.partition("::")[2])
    if chosen is not None:
        return chosen(func, args, kwargs)
    return _meta(func, args, kwargs)


def _meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
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

    return tree_map(lambda t: places(t) if t.dtype == torch.int64 else t, out)


def _first(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Zeros: the first is a possible best."""
    out = _meta(func, args, kwargs)
    return tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.dtype == torch.int64 else t, out)


CHOICES: dict[str, Any] = {
    **dict.fromkeys(("sort", "argsort", "topk"), _in_order),
    **dict.fromkeys(("max", "min", "argmax", "argmin"), _first),
}
"""Where places follow from numbers that are not there."""
