"""Counts large tensors that a piece of code makes, where memory is what matters."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class LargeTensors(TorchFunctionMode):
    """While it is entered, counts results of operations that are neither views nor changed in place.

    Args:
        least: Bytes from which a tensor is large.
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(some) if isinstance(x, torch.Tensor)] for some in ((args, kwargs), out))
        there = {x.untyped_storage().data_ptr() for x in given}
        self.count += sum(x.nbytes >= self.least and x.untyped_storage().data_ptr() not in there for x in made)
        return out
