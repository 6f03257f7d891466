"""Backbones at their published size with random weights: times and memory depend only on shapes."""

from __future__ import annotations

import torch
from torch import nn

from geoaccel.models import build
from geoaccel.precision import cast


def random_full_size(backbone: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A backbone at its published size with random weights.

    Filled in place: initialising a billion numbers with torch takes longer than a forward.
    """
    with torch.device("meta"):
        model = build(backbone)
    model = cast(model, dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_scale = tensor.ndim == 1 and name.endswith("weight")
            tensor.fill_(1.0) if is_scale else tensor.normal_(std=0.02, generator=generator)
    return model
