"""One scene of ``geoaccel reconstruct``: load the model, predict, report and write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from geoaccel.checks import Job
from geoaccel.conditions import KINDS
from geoaccel.console import say, shows_progress, split_names, warn
from geoaccel.errors import USER_ERRORS, UserError
from geoaccel.finished_scenes import MADE_OF

if TYPE_CHECKING:
    from geoaccel import Reconstruction
    from geoaccel.sharding.launch import Session

OPTIONS = (
    *("points", "size", "mode", "masks", "shared_camera", "square_pixels", "scale", "positions", "edge_filter"),
    "tracks",
    *("refine", "max_frames", "recursive", "skip_bad", "reference", "drop_outliers", "max_memory", *KINDS),
)
"""Options of :func:`geoaccel.reconstruct`, under the same names."""


def do_all(work: Iterable[tuple[Job, Callable[[], None]]]) -> None:
    """Reconstruct every scene; an error in one does not stop the others.

    Args:
        work: Scenes, each with a function that makes it.

    Raises:
        ValueError: At the end, naming those that failed.
    """
    from geoaccel.workers import reason_to_go_on

    failed, count = [], 0
    for job, one in work:
        count += 1
        try:
            one()
        except Exception as error:
            if not isinstance(error, USER_ERRORS) and reason_to_go_on(error) is None:
                raise
            warn(f"{job.out.name}: {' '.join(str(error).split())}")
            failed.append(job.out.name)
    if failed:
        raise UserError(f"{len(failed)} of {count} scenes failed: {', '.join(failed)}; see above")


def load(args: argparse.Namespace, device: str, dtype: str, tell: Callable[[str], None]) -> Any:
    """The model of a command, with its methods."""
    import torch

    from geoaccel import accelerate, load_model
    from geoaccel.inputs import check_takes, fitted_to
    from geoaccel.merging.layers import read_layers
    from geoaccel.tuned import TunedPlan

    chosen: dict[str, Any] = {
        "layers": read_layers(args.layers),
        "plan": TunedPlan.read(args.plan) if args.plan else None,
    }
    loaded = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    if (better := for_photographs(args.model, loaded)) is not None:
        tell(f"warning: {args.model} is a test model; for photographs use --model {better}")
    model: Any = accelerate(
        loaded,
        merging=split_names(args.merging),
        quantization=args.quantization,
        attention=args.attention,
        keep_original=args.compare is not None,
        **chosen,
    )
    check_takes(model, [kind for kind in KINDS if getattr(args, kind) is not None])
    fitted_to(model.preprocess, args.size, args.mode)
    return model


def make_scene(
    args: argparse.Namespace, job: Job, formats: Sequence[str], model: Any, dtype: str, device: str, processes: Session
) -> None:
    """Reconstruct one scene in this process, or in a group of them; a line of JSON on stdout."""
    result = predict_scene(args, job, model, dtype, device, processes)
    if result is not None:
        write_scene(args, job, formats, result, dtype, device)


def predict_scene(
    args: argparse.Namespace, job: Job, model: Any, dtype: str, device: str, processes: Session
) -> Reconstruction | None:
    """Predict one scene, and report; None in a process that does not write it."""
    from geoaccel import account, describe, reconstruct
    from geoaccel.prediction import counted_heads

    predicted: dict[str, Any] = {}
    memory: list[dict[str, Any]] = []
    run = ExitStack()

    def on_read(inputs: Any) -> None:
        if not processes.speaks:
            return
        (height, width), left_out = inputs.batch.images.shape[-2:], inputs.batch.left_out
        frames = len(job.pictures) - len(left_out)
        for name, why in left_out.items():
            warn(f"left out {name}: {why}")
        say(f"{frames} x {height} x {width} pixels; running {args.model} in {dtype} on {device}")
        if inputs.plan is not None:
            say(f"memory plan: {inputs.plan}")
        if getattr(model, "sharing", None) is None:  # part of the frames says nothing about all
            heads = counted_heads(model, args.points, args.tracks)
            predicted.update(account.predicted(model, frames, (height, width), heads, inputs.plan))
            memory.append(run.enter_context(account.watched(model, shows=shows_progress())))

    options = {name: getattr(args, name) for name in OPTIONS}
    options |= {"fps": job.fps, "progress": processes.speaks and shows_progress()}
    source, options = processes.given(job.pictures, model, options)
    with run:
        own = reconstruct(source, model=model, **options, on_read=on_read)
    result = processes.whole(own, source)
    if result is None:
        return None
    result.found.update(predicted, **(memory[0] if memory else {}), **describe(model).acting)
    for line in account.done(model, result.found):
        say(line)
    if args.compare is not None:
        again = partial(_same_images, source, result.names, **{**options, "progress": False, "drop_outliers": False})
        result.found.update(account.against_dense(result, model, again))
        say(account.compared(result.found))
    if (traffic := processes.traffic(model)) is not None:
        say(traffic)
    return result


def write_scene(
    args: argparse.Namespace, job: Job, formats: Sequence[str], result: Reconstruction, dtype: str, device: str
) -> None:
    """Write one scene, and report the result; a line of JSON on stdout."""
    from geoaccel import account
    from geoaccel.backbone import ARBITRARY

    if job.made_of is not None:
        result = replace(result, notes={**result.notes, MADE_OF: job.made_of})
    cloud = result.save(
        job.out,
        formats,
        images=args.images,
        tracks=args.tracks,
        overwrite=args.overwrite,
        conf_percentile=args.conf_percentile,
        max_points=args.max_points,
    )
    found = result.found
    if "edge_share" in found:
        share = 100 * found["edge_share"]
        say(f"left out {share:.1f} % of the pixels, at depth edges (--edge-filter {args.edge_filter:g})")
    if "refine" in found:
        say(found["refine"]["text"])
    if "positions" in found:
        _say_agreement(found["positions"], result.unit)
    cameras = "1 camera" if len(result) == 1 else f"{len(result)} cameras"
    say(
        f"{cameras} in {found['seconds']:.1f} s; {100 * cloud.kept_share:.0f} % of the pixels kept "
        f"(--conf-percentile {args.conf_percentile:g}), {len(cloud):,} points written"
    )
    if result.unit != ARBITRARY:
        say(f"unit: {result.unit}")
    made = {**result.summary(), "points": len(cloud), "kept_share": cloud.kept_share}
    account.finished(args, job, formats, dtype, device, made)


def _same_images(source: Any, names: Sequence[str], **options: Any) -> Reconstruction:
    """A reconstruction of all images, of which these are looked at: each model may call others outliers."""
    from geoaccel import reconstruct

    whole = reconstruct(source, **options)
    return whole if whole.names == names else whole.of_frames([whole.names.index(name) for name in names])


def silent(line: str) -> None:
    """Prints nothing, for processes other than the first of a group."""


def _say_agreement(found: dict[str, Any], unit: str) -> None:
    wrong = found["wrong"]
    say(
        f"{found['known'] - len(wrong)} of {found['known']} positions agree, half of them within "
        f"{found['median_error']:.3g} (unit: {unit})"
    )
    for name, error in sorted(wrong.items(), key=lambda item: -item[1]):
        warn(f"position of {name} is off by {error:.3g} and was not used")
    if found["on_a_line"]:
        warn("warning: the positions lie on a line; the rotation of the scene about it is not determined")


def for_photographs(name: str, model: Any) -> str | None:
    """The hub id to recommend instead of a small bundled model."""
    from geoaccel import list_models

    return next(iter(model.backbone.origins), None) if name in list_models() else None
