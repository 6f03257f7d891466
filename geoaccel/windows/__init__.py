"""Sequences of any length: overlapping windows through any model, joined by similarities, a pose graph and loops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from geoaccel.windows.result import LongReconstruction

__all__ = ["reconstruct_windows"]


def reconstruct_windows(source: Any, *, model: nn.Module, out: str | Path, **options: Any) -> LongReconstruction:
    """Reconstruct a sequence of any length, window by window, into a folder. The command line has the same options.

    A run that was killed, or met an error, goes on from its finished windows when it is called again in the same way,
    and ends with the same files.

    Example:
        >>> geoaccel.reconstruct_windows("walk.mp4", model=model, out="walk/", window=32, fps=4)

    Args:
        source: Video, folder, list or glob, in the order of time; also arrays, which are resized as images are.
        model: A geoaccel model, accelerated or not.
        out: Folder for the result.
        options: As of :func:`geoaccel.windows.run.run_windows`.

    Raises:
        ValueError, OSError: In one line, for what cannot be read or does not go together.
        MissingPackage: SciPy is not there.
    """
    from geoaccel import export
    from geoaccel.windows.run import run_windows

    with export.claimed(out):
        return run_windows(source, model=model, out=out, **options)
