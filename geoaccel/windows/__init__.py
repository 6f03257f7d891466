"""Sequences of any length: overlapping windows through any model, joined by Sim(3), a pose graph and loop closure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from geoaccel.windows.result import LongReconstruction

__all__ = ["reconstruct_windows"]


def reconstruct_windows(
    source: Any,
    *,
    model: nn.Module,
    out: str | Path,
    engine: str = "local",
    ray_address: str | None = None,
    **options: Any,
) -> LongReconstruction:
    """Reconstruct a sequence of any length, window by window, into a folder. The command line has the same options.

    A run that was killed or met an error resumes from its finished windows when called again in the same way, and ends
    with the same files.

    Example:
        >>> geoaccel.reconstruct_windows("walk.mp4", model=model, out="walk/", window=32, fps=4)
        >>> geoaccel.reconstruct_windows("walk.mp4", model=model, out="walk/", engine="ray", ray_address="auto")

    Args:
        source: Video, folder, list or glob, in temporal order; also arrays, which are resized as images are.
        model: A geoaccel model, accelerated or not.
        out: Folder for the result.
        engine: ``local``, or ``ray``: workers on a Ray cluster predict the windows. The model is sent to them; they use
            GPUs if it is on one. All machines need image files and videos under the same paths.
        ray_address: ``HOST:PORT`` of the cluster, or ``auto`` for the one on this machine; None starts one for this
            run.
        options: As for :func:`geoaccel.windows.run.run_windows`.

    Raises:
        ValueError, OSError: In one line, for what cannot be read or does not go together.
        MissingPackage: SciPy, or Ray, is not installed.
    """
    from geoaccel import export
    from geoaccel.backbone import require_network
    from geoaccel.errors import UserError
    from geoaccel.windows.run import run_windows
    from geoaccel.windows.sent import sent
    from geoaccel.workers import Here, Workers, check_engine

    require_network(model)
    check_engine(engine, ray_address)
    if getattr(model, "sharing", None) is not None:
        raise UserError("windows run in a single process; leave out --window, or torchrun")
    with export.claimed(out):
        if engine == "local":
            return run_windows(source, workers=Here(model), out=out, **options)
        with Workers(*sent(model, ray_address)) as workers:
            return run_windows(source, workers=workers, out=out, **options)
