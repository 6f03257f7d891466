"""What ``geoaccel reconstruct`` runs: one scene or several."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from geoaccel import export
from geoaccel.checks import Job, check_jobs, check_options
from geoaccel.conditions import KINDS
from geoaccel.console import say, shows_progress, split_names, warn
from geoaccel.errors import USER_ERRORS, UserError
from geoaccel.fingerprint import of_json
from geoaccel.runtime import pick_dtype
from geoaccel.windows_command import check_windows, make_windows

if TYPE_CHECKING:
    from geoaccel.sharding.launch import Session

OPTIONS = (
    *("points", "size", "mode", "masks", "shared_camera", "square_pixels", "scale", "positions", "edge_filter"),
    "tracks",
    *("refine", "max_frames", "recursive", "skip_bad", "reference", "drop_outliers", "max_memory", *KINDS),
)
"""Of :func:`geoaccel.reconstruct`, under the same names."""


def run(args: argparse.Namespace) -> None:
    """Check everything, load the model once, and make each scene; a line of JSON on stdout for each."""
    from geoaccel.sharding.launch import session

    check_windows(args)
    formats = check_options(args, split_names(args.merging))
    with session() as processes:
        run_in(args, formats, processes)


def run_in(args: argparse.Namespace, formats: list[str], processes: Session) -> None:
    """The work of one process, which may be one of several."""
    processes.check(args)
    device = processes.device(args.device)
    dtype = pick_dtype(args.dtype, device)
    jobs = check_jobs(args, formats, writes=processes.speaks)
    processes.agree("number of images", sum(len(job.pictures) for job in jobs))
    processes.agree("list of images", of_json([[picture.name for picture in job.pictures] for job in jobs]))
    if args.dry_run:
        from geoaccel.dry_run import dry_run

        for job in jobs:
            dry_run(args, job, formats, device, dtype)
        return
    with ExitStack() as claims:
        for job in jobs if processes.speaks else ():
            claims.enter_context(export.claimed(job.out))
        model = processes.shared(_load(args, device, dtype, warn if processes.speaks else silent))
        work = [partial(_make_scene, args, job, formats, model, dtype, device, processes) for job in jobs]
        if args.window is not None:
            work = [partial(make_windows, args, job, formats, model, dtype, device) for job in jobs]
        _do_all(work, jobs) if args.scenes else work[0]()


def _do_all(work: Sequence[Callable[[], None]], jobs: Sequence[Job]) -> None:
    """Make every scene; what is wrong with one does not keep the others from being made.

    Raises:
        ValueError: At the end, naming those that were not made.
    """
    failed = []
    for one, job in zip(work, jobs, strict=True):
        try:
            one()
        except USER_ERRORS as error:
            warn(f"{job.out.name}: {' '.join(str(error).split())}")
            failed.append(job.out.name)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} scenes were not made: {', '.join(failed)}; see above")


def _load(args: argparse.Namespace, device: str, dtype: str, tell: Callable[[str], None]) -> Any:
    import torch

    from geoaccel import accelerate, load_model
    from geoaccel.inputs import check_takes, fitted_to
    from geoaccel.tuned import TunedPlan

    chosen = {"layers": read_layers(args.layers), "plan": TunedPlan.read(args.plan) if args.plan else None}
    loaded = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    if (better := for_photographs(args.model, loaded)) is not None:
        tell(f"warning: {args.model} is a test instrument; for photographs use --model {better}")
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


def _make_scene(
    args: argparse.Namespace,
    job: Job,
    formats: Sequence[str],
    model: Any,
    dtype: str,
    device: str,
    processes: Session,
) -> None:
    from geoaccel import account, reconstruct
    from geoaccel.backbone import ARBITRARY
    from geoaccel.prediction import needed_heads

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
            say(f"to keep within the memory: {inputs.plan}")
        if getattr(model, "sharing", None) is None:  # a share of the frames says nothing of all
            heads = needed_heads(model, args.points)
            predicted.update(account.predicted(model, frames, (height, width), heads, inputs.plan))
            memory.append(run.enter_context(account.watched(model, shows=shows_progress())))

    options = {name: getattr(args, name) for name in OPTIONS}
    options |= {"fps": job.fps, "progress": processes.speaks and shows_progress()}
    source, options = processes.given(job.pictures, model, options)
    with run:
        own = reconstruct(source, model=model, **options, on_read=on_read)
    result = processes.whole(own, source)
    if result is None:
        return
    result.found.update(predicted, **(memory[0] if memory else {}))
    for line in account.done(model, result.found):
        say(line)
    if args.compare is not None:
        again = partial(reconstruct, source, **{**options, "progress": False})
        result.found.update(account.against_dense(result, model, again))
        say(account.compared(result.found))
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
        say(f"{share:.1f} % of the pixels are at depth edges and left out (--edge-filter {args.edge_filter:g})")
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
    if (traffic := processes.traffic(model)) is not None:
        say(traffic)
    made = {**result.summary(), "points": len(cloud), "kept_share": cloud.kept_share}
    account.finished(args, job, formats, dtype, device, made)


def silent(line: str) -> None:
    """What a process says that is not the first of its group."""


def _say_agreement(found: dict[str, Any], unit: str) -> None:
    wrong = found["wrong"]
    say(
        f"{found['known'] - len(wrong)} of {found['known']} positions agree, half of them within "
        f"{found['median_error']:.3g} (unit: {unit})"
    )
    for name, error in sorted(wrong.items(), key=lambda item: -item[1]):
        warn(f"position of {name} is off by {error:.3g} and was not used")
    if found["on_a_line"]:
        warn("warning: the positions lie on a line; how the scene is turned about it is not known")


def for_photographs(name: str, model: Any) -> str | None:
    """The hub id to take in place of a small model that comes with the package."""
    from geoaccel import list_models

    return next(iter(model.backbone.origins), None) if name in list_models() else None


def read_layers(text: str | None) -> Any:
    """Layers as the command line gives them: a mapping in YAML, or the name of a preset."""
    import yaml

    from geoaccel.merging.layers import Layers

    try:
        return Layers.read(None if text is None else yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"--layers {text} does not parse; give '{{0-8: frame-only, 9-23: httm}}'") from None
