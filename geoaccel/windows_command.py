"""``geoaccel reconstruct --window``: a sequence of any length, window by window."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from geoaccel.api import describe
from geoaccel.checks import Job
from geoaccel.conditions import KINDS
from geoaccel.console import say, shows_progress, warn
from geoaccel.errors import UserError
from geoaccel.finished_scenes import MADE_OF
from geoaccel.options.names import USUAL_FORMATS, WINDOW_FORMATS
from geoaccel.windows.graph import require_scipy
from geoaccel.windows.predict import check_lengths
from geoaccel.windows.result import LongReconstruction
from geoaccel.windows.run import check_formats, run_windows
from geoaccel.workers import Here, Workers

NOT_YET = (
    *("masks", "shared_camera", "square_pixels", "scale", "positions", "refine", "drop_outliers", "compare"),
    *KINDS,
)
"""Options that need all images at once."""
ALONE = ("overlap", "wide", "loops")
"""Options that apply only to windows."""


def check_windows(args: argparse.Namespace) -> None:
    """Refuse options that do not work with windows, and fill in the defaults with and without them.

    Raises:
        UserError: Naming the option.
        MissingPackage: SciPy is not installed.
    """
    if args.window is None:
        if name := next((name for name in ALONE if getattr(args, name) is not None), None):
            raise UserError(f"--{name} applies only to windows; add --window auto, or leave it out")
        _fill_in(args, formats=USUAL_FORMATS, reference="first")
        return
    require_scipy()
    args.window = int(args.window) if args.window.isdecimal() else args.window
    check_lengths(args.window, args.overlap)
    if name := next((name for name in NOT_YET if getattr(args, name) not in (None, False)), None):
        raise UserError(f"--{name.replace('_', '-')} does not work with windows yet; leave out one of the two")
    for name, given, allowed in (
        ("points", args.points, ("depth",)),
        ("tracks", args.tracks, ("auto", "project")),
        ("images", args.images, ("link", "copy")),
    ):
        if given not in allowed:
            raise UserError(f"--{name} {given} does not work with windows; use {' or '.join(allowed)}")
    _fill_in(args, formats=WINDOW_FORMATS, reference="auto")
    if args.reference.isdecimal():
        raise UserError(f"--reference {args.reference}: every window chooses its own reference; leave it out")
    check_formats(args.formats)


def _fill_in(args: argparse.Namespace, **usual: str) -> None:
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_windows(
    args: argparse.Namespace,
    job: Job,
    formats: Sequence[str],
    workers: Here | Workers,
    dtype: str,
    device: str,
    where: str,
) -> None:
    """Reconstruct one scene; a line of JSON on stdout.

    Args:
        args: Command-line options.
        job: The scene.
        formats: Formats to write.
        workers: Where the model runs.
        dtype, device: Those of the model.
        where: The same as text.
    """
    from geoaccel.account import finished

    say(f"{len(job.pictures)} frames in windows; running {args.model} {where}")
    result = run_windows(
        job.pictures,
        workers=workers,
        out=job.out,
        formats=list(formats),
        window=args.window,
        overlap=args.overlap,
        wide=args.wide is not False,
        loops=args.loops is not False,
        reference=args.reference,
        size=args.size,
        mode=args.mode,
        edge_filter=args.edge_filter,
        skip_bad=args.skip_bad,
        max_memory=args.max_memory,
        conf_percentile=args.conf_percentile,
        max_points=args.max_points,
        images=args.images,
        overwrite=args.overwrite,
        about={} if job.made_of is None else {MADE_OF: job.made_of},
        progress=shows_progress(),
        tell=say,
    )
    _say(result)
    acted = workers.ask(_acting)[0]
    finished(args, job, formats, dtype, device, result.summary() | acted | {"points": sum(result.points)})


def _acting(model: Any) -> dict[str, str | None]:
    return describe(model).acting


def _say(result: LongReconstruction) -> None:
    """Report the result."""
    found = result.summary()
    for name, why in result.left_out.items():
        warn(f"left out {name}: {why}")
    say(
        f"{found['frames']} frames in {found['windows']} windows of {found['window']}, {found['overlap']} shared; "
        f"{found['wide']} wide windows, {found['wide_rejected']} rejected; "
        f"{found['loops']} loops closed, {found['loops_rejected']} rejected; {sum(result.points):,} points written"
    )
    if len(result.pieces) > 1:
        spans = ", ".join(f"{first} to {last}" for first, last, _ in found["pieces"])
        warn(f"warning: {len(result.pieces)} disconnected pieces (frames {spans}), each in its own world frame")
