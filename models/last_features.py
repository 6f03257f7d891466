"""Reading features of networks whose heads see the last two decoder blocks: pi3 and Pi3X."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoaccel.errors import UserError


def feature_layer(model: Any, layer: int | None) -> int:
    """The last layer, the only one that can be read.

    Raises:
        UserError: For any other.
    """
    if layer not in (None, -1):
        name = model.backbone.name
        raise UserError(f"layer={layer} cannot be read: {name}'s features are those of its last blocks; omit layer")
    return len(model.decoder) // 2 - 1


def read_features(model: Any, images: Tensor, layer: int, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The last two blocks of the decoder, which the heads read."""
    features = model.features(images)
    return features, model.predict(features, model.grid(images), model.heads) if predict else {}
