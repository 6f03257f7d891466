"""Estimates that a few wild values cannot drag."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_median(
    values: Tensor,  # [..., N]
    weights: Tensor,  # [..., N], not negative
) -> Tensor:  # [...]
    """The value below and above which half of the weight lies: it minimises ``sum w |v - m|`` exactly."""
    order = values.argsort(dim=-1)
    cumulative = weights.gather(-1, order).cumsum(dim=-1)
    middle = torch.searchsorted(cumulative, cumulative[..., -1:] / 2).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, order).gather(-1, middle)[..., 0]
