"""Networks without weights, for estimates before a checkpoint is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from geoaccel.backbone import Backbone
from geoaccel.precision import cast


def without_weights(backbone: Backbone, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """A published network on the meta device, its heads in float32."""
    with torch.device("meta"):
        return cast(backbone.build(**config), dtype).requires_grad_(False)
