"""The dtype of a network: casting it, and parts that compute in their own dtype whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available


def own_precision(device: torch.device) -> AbstractContextManager:
    """Turn the caller's autocast off, for heads and comparisons of tokens.

    The meta device, where shapes are computed without data, has no autocast.
    """
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast in place, tensor by tensor; for a narrow dtype the heads and the network's own buffers keep float32.

    The backbone names those heads (``Backbone.heads_in_float32``).
    """
    heads = getattr(getattr(model, "backbone", None), "heads_in_float32", ())
    wide = torch.promote_types(dtype, torch.float32)
    for name, child in model.named_children():
        child.to(wide if name in heads else dtype)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers(recurse=False):
        buffer.data = buffer.data.to(wide)
    return model
