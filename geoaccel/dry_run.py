"""``geoaccel reconstruct --dry-run``: number and size of frames, memory, and the files that would be written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from geoaccel import export
from geoaccel.checks import Job
from geoaccel.console import print_json, say
from geoaccel.errors import UserError
from geoaccel.images import load_images
from geoaccel.inputs import fitted_to
from geoaccel.memory import GIB, Limit, choose, free_bytes, host_room, readable
from geoaccel.models.files import origins
from geoaccel.models.outline import without_weights
from geoaccel.models.weights import load_model
from geoaccel.prediction import counted_heads
from geoaccel.windows.predict import check_lengths, lengths_for


def dry_run(args: argparse.Namespace, job: Job, formats: Sequence[str], device: str, dtype: str) -> None:
    """Report it for one scene, with a line of JSON on stdout. Reads the first image, but no published weights.

    Raises:
        ValueError: If the run would be refused.
    """
    known, precision = origins().get(args.model), getattr(torch, dtype)
    if known is None:
        model: Any = load_model(args.model, device=device, dtype=precision)
    else:
        model = without_weights(known[0], known[1].config, precision)
    preprocess = fitted_to(model.preprocess, args.size, args.mode)
    first = load_images(job.pictures[:1], preprocess)
    size = (first.images.shape[-2], first.images.shape[-1])
    limit = Limit.of(args.max_memory, device) or Limit()
    limit = replace(limit, heads=tuple(counted_heads(model, args.points, args.tracks)))
    room = limit.room(torch.device(device), free_bytes(torch.device(device)))
    frames = len(job.pictures)
    if args.window is not None:
        check_lengths(args.window, args.overlap, frames)
        frames = min(frames, lengths_for(model, args.window, args.overlap, size, limit).window)
    choice = choose(model, frames, size, limit, room, host=host_room(torch.device(device)))
    writes = export.planned(formats, args.images)
    say(f"{len(job.pictures)} images; network input {size[0]} x {size[1]} pixels (H x W) for the first one")
    if frames < len(job.pictures):
        say(f"in windows of {frames}")
    fits = "fits" if choice.fits else "does not fit"
    say(f"about {choice.needed / GIB:.2f} GiB on {device} for the dense model, {room / GIB:.1f} GiB are free: {fits}")
    say(f"memory plan: {choice.plan or 'none needed, everything runs at once'}")
    for name, files in writes.items():
        say(f"{name}: {', '.join(str(job.out / file) for file in files)}")
    summary = {
        "dry_run": True,
        "out": str(job.out),
        "model": args.model,
        "frames": len(job.pictures),
        "size": list(size),
        "device": device,
        "memory_gib": choice.needed / GIB,
        "free_gib": room / GIB,
        "memory_plan": None if choice.plan is None else asdict(choice.plan),
        "fits": choice.fits,
        "writes": writes,
    }
    print_json(summary)
    if not choice.fits:
        raise UserError(
            f"{frames} frames need about {readable(choice.needed)} on {device}, "
            f"{readable(room)} are free; "
            "take fewer frames (--max-frames), a smaller --size, or --dtype bfloat16"
        )
