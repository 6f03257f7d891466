"""Sending a model to the workers of a cluster."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from geoaccel.errors import UserError
from geoaccel.workers import Team
from geoaccel.workers.cluster import require_ray


def sent(model: nn.Module, address: str | None) -> tuple[Team, Callable[..., nn.Module], bytes, str]:
    """Arguments of `Workers` for a model of this process, with its methods.

    Args:
        model: On the kind of device that workers should use.
        address: Address of the cluster.

    Raises:
        UserError: If it cannot be serialised.
    """
    device = next(model.parameters()).device.type
    buffer = io.BytesIO()
    try:
        torch.save(model, buffer, pickle_module=require_ray().cloudpickle)
    except (TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"this model cannot be sent to workers ({reason}); use engine='local'") from None
    return Team(address, gpus=float(device == "cuda")), received, buffer.getvalue(), device


def received(sent: bytes, device: str) -> Any:
    """The model on a worker's own device."""
    return torch.load(io.BytesIO(sent), map_location=device, weights_only=False)
