"""ReLU and addition in place without gradients: the maps of dense heads are large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rectify(x: Tensor) -> Tensor:
    """ReLU of a tensor that is not read afterwards."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def add_to(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, if x is not read afterwards."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


class Rectified(nn.ReLU):
    """:func:`rectify` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return rectify(x)
