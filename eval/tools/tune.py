"""Implementation of ``geoaccel tune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geoaccel.console import bar, say
from geoaccel.errors import UserError
from geoaccel.eval.tools.steps import resumable
from geoaccel.fingerprint import of_others
from geoaccel.runtime import pick_device, pick_dtype

CODE = ("eval.data", "eval.metrics", "eval.tuning")


def run_tune(args: argparse.Namespace) -> None:
    """Check, measure, choose, write."""
    import torch

    from geoaccel.atomic import check_output_file, write_bytes
    from geoaccel.eval.run.made_by import made_by, write_record
    from geoaccel.eval.tuning.budget import Budget
    from geoaccel.eval.tuning.earlier import Earlier
    from geoaccel.eval.tuning.memory import check_fits
    from geoaccel.eval.tuning.photographs import find_halves, halves
    from geoaccel.eval.tuning.picture import picture
    from geoaccel.eval.tuning.report import document, notes, table
    from geoaccel.eval.tuning.timing import timed
    from geoaccel.eval.tuning.trials import Trials
    from geoaccel.eval.tuning.tune import CHOOSING, UNSEEN, Tuner
    from geoaccel.linears import quantized_linears
    from geoaccel.memory import check_memory
    from geoaccel.merging.layers import Layers
    from geoaccel.models.weights import load_model
    from geoaccel.quantization.calibrate.progress import Progress
    from geoaccel.tuned import TunedPlan, of_weights

    budget = Budget.read(
        pose=args.max_pose_error, depth=args.max_depth_error, speedup=args.speedup, memory=args.max_memory
    )
    earlier = None if args.measured is None else Earlier.read(args.measured)
    out = check_output_file(args.out, ".yaml", overwrite=args.overwrite)
    kept = Path(f"{out}.progress")
    beside = {
        suffix: check_output_file(out.with_suffix(suffix), suffix, overwrite=args.overwrite or kept.exists())
        for suffix in (".json", ".png")
    }
    find_halves(args.input, args.frames)  # checks them before weights are read
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model: Any = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    if quantized_linears(model) and budget.memory_bytes is not None:
        raise UserError(f"{args.model} is quantized already; leave out --max-memory, or tune its float checkpoint")
    parts = halves(args.input, model, args.frames)
    images = parts.together.load()
    frames, size = images.shape[1], (images.shape[-2], images.shape[-1])
    check_memory(model, frames=frames, size=size, planned=False)
    check_fits(model, budget, frames, size)
    made, weights = made_by(device, CODE), of_weights(model)
    # Not the budget: another one may reuse the measurements.
    config = {**made, "weights": weights, "dtype": dtype, "packages": of_others([type(model)]), **parts.describe()}
    found_before = {} if earlier is None else earlier.errors(config)
    progress = Progress(kept, config)
    trials = Trials(model, {CHOOSING: parts.choosing, UNSEEN: parts.unseen}, progress, found_before)
    tuner = Tuner(trials, budget, frames, size, track=bar, report=say)
    used = f"{len(parts.choosing[0].files)} of {frames} photographs of {size[0]} x {size[1]} pixels"
    say(f"tuning {args.model} on {used}, {tuner.depth} layers")
    with resumable():
        found = tuner.run()
        say(f"timing the plan and the dense model alternately on {frames} photographs")
        timing = timed(model, found.change, images.to(device))
    facts = {"model": args.model, "weights": weights, "photographs": frames, "size": list(size), "dtype": dtype}
    described = {**facts, **document(found, budget, timing), **Earlier.document(config, trials.found)}
    write_bytes(beside[".png"], picture(described))
    write_record(beside[".json"], made, described)
    layers = Layers(tuple((layer, layer, method) for layer, method in enumerate(found.change.layers)))
    plan = TunedPlan(weights, layers, found.change.quantization, notes(found, budget, frames, size))
    plan.write(out, tuner.depth)
    progress.finish()
    print(table(found, budget, timing))
    print(f"wrote {out}, {beside['.json']} and {beside['.png']}")
