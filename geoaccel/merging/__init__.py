"""Token merging methods: one paper, one file.

Every module of this package is imported, so that adding a file registers its method; entry points ``geoaccel.merging``
of other packages are imported at the first look-up. Methods are attributes of this package under their class name:
``from geoaccel.merging import FastVGGT``. So is everything that the author of a method needs (docs/extending.md).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from geoaccel.attention import AttentionContext, ForwardState, Restore
from geoaccel.attention_kernels import attend
from geoaccel.errors import UserError
from geoaccel.knobs import check_knobs, whole_numbers
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.frames import FirstFrameLayer, FrameLayer
from geoaccel.merging.gain import Extra, Work
from geoaccel.merging.joint import dense_layout
from geoaccel.merging.method import (
    MERGING,
    AttentionMerging,
    Effect,
    MergingMixer,
    MergingPacker,
    SpanMerging,
    check_share,
    register,
)
from geoaccel.plan import MergePlan
from geoaccel.similarity import best_match

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def __getattr__(name: str) -> Any:
    for method in MERGING.values():
        if getattr(method, "__name__", None) == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MERGING",
    "AttentionContext",
    "AttentionMerging",
    "Effect",
    "Extra",
    "FirstFrameLayer",
    "ForwardState",
    "FrameLayer",
    "MergePlan",
    "MergingMixer",
    "MergingPacker",
    "Packing",
    "Restore",
    "SpanMerging",
    "TokenLayout",
    "UserError",
    "Work",
    "attend",
    "best_match",
    "check_knobs",
    "check_share",
    "dense_layout",
    "register",
    "whole_numbers",
]
