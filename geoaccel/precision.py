"""Heads, and comparisons of tokens, compute in the dtype of their own numbers, whatever the caller's autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.autocast_mode import is_autocast_available


def own_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off; the meta device, where shapes are computed without data, has none."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
