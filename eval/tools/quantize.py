"""Implementation of ``geoaccel quantize``: export, calibrate and sensitivity."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from geoaccel.console import bar, say
from geoaccel.errors import UserError
from geoaccel.eval.tools.steps import resumable
from geoaccel.fingerprint import of_others
from geoaccel.runtime import pick_device


def run_export(args: argparse.Namespace) -> None:
    """``export`` and ``calibrate``."""
    from geoaccel.models.files import fingerprint
    from geoaccel.quantization import TaskSearch
    from geoaccel.quantization.calibrate.calibration import Calibration, calibrate
    from geoaccel.quantized_file import export_quantized

    methods = _methods(args)
    options: dict[str, Any] = {"dtype": args.dtype, "overwrite": args.overwrite, "report": say}
    if args.action == "export":
        print(f"wrote {export_quantized(args.model, methods, args.out, **options)}")
        return
    folder = Path(f"{args.out}.progress").expanduser()
    task = TaskSearch(shortlist=args.shortlist)
    scenes = _scenes(args)
    calibration = Calibration(
        patches_only=not args.all_tokens,
        scales=args.search != "none",
        task=task if args.search == "task" else None,
        compensate=args.rounding == "compensated",
        camera_token=args.camera_token,
        device=pick_device(args.device),
    )
    calibration.check(methods)
    weights = fingerprint(args.model)

    def step(network: nn.Module) -> dict[str, Any]:
        clips = scenes.clips(network)
        described = scenes.describe(clips)
        kept: Any = {"weights": weights, "folder": folder}
        return calibrate(network, methods, calibration, clips, scenes=described, **kept, track=bar, report=say)

    with resumable():
        written = export_quantized(args.model, methods, args.out, calibrate=step, **options)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {written}")


def run_sensitivity(args: argparse.Namespace) -> None:
    """``sensitivity``."""
    import torch

    from geoaccel.atomic import check_output_file, write_bytes
    from geoaccel.eval.run.made_by import EFFECTS, made_by, write_record
    from geoaccel.eval.tools.sensitivity import Sensitivity, measure_sensitivity
    from geoaccel.eval.tools.sensitivity_plot import sensitivity_plot
    from geoaccel.linears import quantized_linears
    from geoaccel.models.files import fingerprint
    from geoaccel.models.weights import load_model
    from geoaccel.quantization import FP8
    from geoaccel.quantization.calibrate.clip import in_order
    from geoaccel.quantization.calibrate.progress import Progress

    out = check_output_file(args.out, ".json", overwrite=args.overwrite)
    kept = Path(f"{out}.progress")
    # The figure is written first: an existing progress file may be this command's own.
    picture = check_output_file(out.with_suffix(".png"), ".png", overwrite=args.overwrite or kept.exists())
    settings = Sensitivity(
        low=_methods(args)[0],
        high=FP8(activations=False) if args.protect == "fp8" else None,
        rank_by=args.rank_by,
        budget_bytes=None if args.budget_gb is None else round(args.budget_gb * 1e9),
        max_effect=args.max_effect,
        draws=args.draws,
    )
    scenes = _scenes(args)
    device = pick_device(args.device)
    model = load_model(args.model, device=device, dtype=torch.float32)
    if quantized_linears(model):
        raise UserError(f"{args.model} is quantized already; start from its float checkpoint")
    clips = scenes.clips(model)
    described = {"weights": fingerprint(args.model), **scenes.describe(clips)}
    usable = [clip for clip in clips if not clip.files or len(clip.files) > 1]
    made = made_by(device, EFFECTS)
    decides = {**made, **described, "settings": str(settings), "packages": of_others([type(model), type(settings.low)])}
    progress = Progress(kept, {**decides, "clips": in_order(clips)})
    with resumable():
        document = measure_sensitivity(model, settings, usable, progress=progress, track=bar, report=say)
    write_bytes(picture, sensitivity_plot(document))
    write_record(out, made, {"model": args.model, **described, **document})
    progress.finish()
    chosen = document["allocation"]
    print(
        f"wrote {out} and {picture}: {len(chosen['protected'])} of {len(document['units'])} blocks "
        f"protected as {args.protect}, {chosen['file_bytes'] / 1e6:,.1f} MB instead of "
        f"{chosen['file_bytes_low'] / 1e6:,.1f} MB"
    )


def _methods(args: argparse.Namespace) -> list[Any]:
    """Quantization methods of a command: one and its knobs, or a mix from a file."""
    from geoaccel.quantization import QUANTIZATION

    given = {"include": args.include, "exclude": args.exclude, "group_size": args.group_size}
    knobs = {knob: value for knob, value in given.items() if value is not None}
    allocation = getattr(args, "allocation", None)
    if (args.quantization is None) == (allocation is None):
        both = ", or --allocation FILE, and not both" if hasattr(args, "allocation") else ""
        raise UserError(f"give --quantization {' or '.join(QUANTIZATION)}{both}")
    if allocation is not None:
        if knobs:
            raise UserError(f"--{next(iter(knobs)).replace('_', '-')} does not go with --allocation, which has its own")
        return _allocation(Path(allocation).expanduser(), args.model)
    constructor: Any = QUANTIZATION[args.quantization]
    for knob in knobs.keys() - {entry.name for entry in dataclasses.fields(constructor)}:
        raise UserError(f"{args.quantization} has no {knob}; leave out --{knob.replace('_', '-')}")
    return [constructor(**knobs)]


def _allocation(path: Path, model: str) -> list[Any]:
    from geoaccel.models.files import fingerprint
    from geoaccel.quantization.calibrate.allocation import from_records

    try:
        document = json.loads(path.read_text())
        records, weights = document["allocation"]["methods"], document["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of quantize sensitivity ({error}); give its .json file") from None
    if weights != fingerprint(model):
        raise UserError(f"{path} was measured on other weights than those of {model}; measure it again on these")
    if not records:
        raise UserError(f"{path} keeps every block in float, which leaves nothing to quantize; give a lower budget")
    return from_records(records)


def _scenes(args: argparse.Namespace) -> Any:
    from geoaccel.eval.data.calibration import CalibrationScenes, find_photographs

    for folder in args.images:  # checks them before weights are read
        find_photographs(folder)
    seed = {} if args.first_seed is None else {"first_seed": args.first_seed}
    return CalibrationScenes(
        folders=tuple(args.images),
        co3d=args.co3d,
        categories=tuple(args.categories),
        co3d_subset=args.co3d_subset,
        scenes=args.scenes,
        frames=args.frames,
        evaluation=tuple(args.evaluation),
        **seed,
    )
