"""Token merging methods: one paper, one file.

Every module of this package is imported, so that a method is known once its file is there. Methods are attributes of
the package by the name of their class: ``from geoaccel.merging import FastVGGT``.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from geoaccel.merging.method import (
    MERGING,
    AttentionMerging,
    Effect,
    MergingMixer,
    MergingPacker,
    SpanMerging,
    register,
)

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def __getattr__(name: str) -> Any:
    for method in MERGING.values():
        if getattr(method, "__name__", None) == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MERGING", "AttentionMerging", "Effect", "MergingMixer", "MergingPacker", "SpanMerging", "register"]
