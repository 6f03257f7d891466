"""Objects as a user of upstream's packages has them, made of our own networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from geoaccel.models.da3 import DA3
from geoaccel.models.pi3 import Pi3
from geoaccel.models.pi3x import Pi3X
from geoaccel.models.vggt import VGGT


def upstream_double(model: nn.Module) -> nn.Module:
    """An object with upstream's class name, tree and attributes (as the released constructors leave them)."""
    m: Any = model
    if isinstance(model, VGGT):
        m.aggregator.rope = SimpleNamespace(base_frequency=100)
        for head in (m.depth_head, m.point_head, m.track_head.feature_extractor):
            head.intermediate_layer_idx = list(head.layers)
    elif isinstance(model, Pi3 | Pi3X):
        m.rope = SimpleNamespace(base=100.0)
    elif isinstance(model, DA3):
        m.trunk_module.rope = SimpleNamespace(base_frequency=100.0)
        m.get_submodule("backbone").out_layers = list(model.config.out_layers)
    if isinstance(model, Pi3X):
        m.pose_inject_after = model.config.pose_inject_after  # a literal of the released forward
    m.__class__ = type(m.backbone.class_names[0], (type(model),), {})
    return model
