"""``geoaccel reconstruct --window``: a sequence of any length, window by window."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from geoaccel.checks import Job
from geoaccel.conditions import KINDS
from geoaccel.console import say, shows_progress
from geoaccel.errors import UserError
from geoaccel.windows.graph import require_scipy
from geoaccel.windows.predict import check_lengths
from geoaccel.windows.result import LongReconstruction
from geoaccel.windows.run import DEFAULT_FORMATS, check_formats, run_windows

USUAL_FORMATS = "ply,glb,colmap,png,view"
"""Of the command where none are named: png and view need all images at once, and there is tum in their place."""
NOT_YET = ("masks", "shared_camera", "square_pixels", "scale", "positions", "refine", "drop_outliers", *KINDS)
"""Options of the command that need all images at once."""


def check_windows(args: argparse.Namespace) -> None:
    """Refuse what windows cannot do, and choose formats where none are named.

    Raises:
        UserError: Naming the option.
        MissingPackage: SciPy is not there.
    """
    if args.window is None:
        if args.overlap is not None:
            raise UserError("--overlap is for windows; give --window auto, too, or leave it out")
        return
    require_scipy()
    args.window = int(args.window) if args.window.isdecimal() else args.window
    check_lengths(args.window, args.overlap)
    if name := next((name for name in NOT_YET if getattr(args, name) not in (None, False)), None):
        raise UserError(f"--{name.replace('_', '-')} is not for windows yet; leave it out, or leave out --window")
    for name, given, allowed in (
        ("points", args.points, ("depth",)),
        ("tracks", args.tracks, ("auto", "project")),
        ("images", args.images, ("link", "copy")),
    ):
        if given not in allowed:
            raise UserError(f"--{name} {given} is not for windows; take {' or '.join(allowed)}")
    if args.reference.isdecimal():
        raise UserError(f"--reference {args.reference}: every window chooses its own; leave it out")
    if args.formats == USUAL_FORMATS:
        args.formats = ",".join(DEFAULT_FORMATS)
    check_formats(args.formats)


def make_windows(
    args: argparse.Namespace, job: Job, formats: Sequence[str], model: Any, dtype: str, device: str
) -> None:
    """Make one scene; a line of JSON on stdout."""
    say(f"{len(job.pictures)} frames in windows; running {args.model} in {dtype} on {device}")
    result = run_windows(
        job.pictures,
        model=model,
        out=job.out,
        formats=list(formats),
        window=args.window,
        overlap=args.overlap,
        loops=args.loops,
        size=args.size,
        mode=args.mode,
        edge_filter=args.edge_filter,
        skip_bad=args.skip_bad,
        max_memory=args.max_memory,
        conf_percentile=args.conf_percentile,
        max_points=args.max_points,
        images=args.images,
        overwrite=args.overwrite,
        progress=shows_progress(),
        tell=say,
    )
    _say(result)
    for path in sorted(path for path in job.out.iterdir() if not path.name.startswith(".")):
        say(f"wrote {path}{'/' if path.is_dir() else ''}")
    summary = {
        "out": str(job.out),
        "model": args.model,
        "merging": args.merging,
        "quantization": args.quantization,
        "dtype": dtype,
        "device": device,
        **result.summary(),
        "points": sum(result.points),
        "formats": list(formats),
    }
    print(json.dumps(summary), flush=True)


def _say(result: LongReconstruction) -> None:
    """What people want to know of it."""
    found = result.summary()
    for name, why in result.left_out.items():
        say(f"left out {name}: {why}")
    say(
        f"{found['frames']} frames in {found['windows']} windows of {found['window']}, {found['overlap']} shared; "
        f"{found['loops']} loops closed, {found['loops_rejected']} rejected; {sum(result.points):,} points written"
    )
    if len(result.pieces) > 1:
        spans = ", ".join(f"{first} to {last}" for first, last, _ in found["pieces"])
        say(f"warning: {len(result.pieces)} pieces that nothing joins (frames {spans}), each in a world of its own")
