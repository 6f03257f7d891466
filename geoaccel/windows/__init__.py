"""Sequences of any length: overlapping windows through any model, joined by similarities, a pose graph and loops."""

from geoaccel.windows.run import (
    DEFAULT_FORMATS,
    FORMATS,
    LongReconstruction,
    check_formats,
    reconstruct_windows,
    run_windows,
)

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "LongReconstruction",
    "check_formats",
    "reconstruct_windows",
    "run_windows",
]
