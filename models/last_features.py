"""What is read of networks whose heads see the last two blocks of the decoder: pi3 and Pi3X."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoaccel.errors import UserError


def feature_layer(model: Any, layer: int | None) -> int:
    """The last of the layers, which alone can be read.

    Raises:
        UserError: For another one.
    """
    if layer not in (None, -1):
        name = model.backbone.name
        raise UserError(f"layer={layer}: {name}'s features are those of its last blocks; leave layer out")
    return len(model.decoder) // 2 - 1


def read_features(model: Any, images: Tensor, layer: int, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The last two blocks of the decoder, which the heads read."""
    features = model.features(images)
    return features, model.predict(features, model.grid(images), model.heads) if predict else {}
