"""How much torch does, which must not grow faster than a scene."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Work(TorchFunctionMode):
    """Counts what torch is asked for while it is entered.

    Attributes:
        calls: So many.
        elements: Of all tensors that they gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call."""
        given = func(*args, **(kwargs or {}))
        self.calls += 1
        self.elements += given.numel() if isinstance(given, Tensor) else 0
        return given


def work_of(function: Callable[[], object]) -> Work:
    """What a call of a function takes."""
    with Work() as work, torch.no_grad():
        function()
    return work
