"""``geoaccel reconstruct``: options as :func:`geoaccel.reconstruct` has them, one scene or several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from geoaccel import export
from geoaccel.checks import Job, check_jobs, check_options
from geoaccel.conditions import KINDS
from geoaccel.console import say, split_names
from geoaccel.errors import USER_ERRORS, UserError
from geoaccel.fingerprint import of_json
from geoaccel.runtime import DTYPES, pick_dtype
from geoaccel.windows_command import add_options as add_windows
from geoaccel.windows_command import check_windows, make_windows

if TYPE_CHECKING:
    from geoaccel.sharding.launch import Session

FORMATS = "ply,glb,colmap,png"
OPTIONS = (
    *("points", "size", "mode", "masks", "shared_camera", "square_pixels", "scale", "positions", "edge_filter"),
    *("refine", "max_frames", "recursive", "skip_bad", "reference", "drop_outliers", *KINDS),
)
"""Of :func:`geoaccel.reconstruct`, under the same names."""


def add_options(rec: argparse.ArgumentParser) -> None:
    """All options of the command."""
    rec.add_argument("input", nargs="+", metavar="INPUT", help="folder of images, image files, glob, or one video")
    rec.add_argument("--out", required=True, help="output folder; new, empty, or with nothing but the images in it")
    _add_model(rec)
    _add_input(rec)
    _add_priors(rec)
    _add_output(rec)
    add_windows(rec)
    rec.set_defaults(run=run)


def _add_model(rec: argparse.ArgumentParser) -> None:
    rec.add_argument("--model", default="vggt-mini", help="embedded name, hub id or file (default: %(default)s)")
    rec.add_argument("--merging", help="token merging method, or several as alike,httm")
    rec.add_argument("--quantization", help="quantization method")
    rec.add_argument("--layers", help="methods of single layers, as '{0-8: frame-only, 9-23: httm}', or a preset")
    rec.add_argument("--plan", help="file of geoaccel tune, in place of --merging, --layers and --quantization")
    rec.add_argument("--attention", help="attention kernel: sdpa (default), xformers, matmul or fp8")
    rec.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    rec.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: what geoaccel info names")


def _add_input(rec: argparse.ArgumentParser) -> None:
    rec.add_argument("--fps", type=float, help="frames per second to take of a video")
    rec.add_argument("--max-frames", type=int, help="use at most this many images, evenly spread")
    rec.add_argument("--recursive", action="store_true", help="search the subfolders of a folder, too")
    rec.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and name them")
    rec.add_argument("--scenes", action="store_true", help="each INPUT is a scene of its own, written to OUT/its name")
    rec.add_argument("--size", type=int, help="width or long side of the network input in pixels")
    rec.add_argument(
        "--mode", choices=("crop", "pad", "budget", "long"), help="how images are fitted (default: the model's)"
    )
    rec.add_argument(
        "--reference", default="first", help="image that comes first: first, auto or a number from 0; of windows auto"
    )
    rec.add_argument("--drop-outliers", action="store_true", help="leave out images that are unlike the others")
    rec.add_argument("--masks", help="folder with a mask for each photograph; bright pixels are kept")


def _add_priors(rec: argparse.ArgumentParser) -> None:
    rec.add_argument("--poses", help="known poses: transforms.json or poses.json; of some images or of all")
    rec.add_argument("--depths", help="folder of known depths: .npy in the unit of the poses, or 16-bit .png in mm")
    rec.add_argument(
        "--intrinsics", help="known intrinsics: f or fx,fy,cx,cy in pixels of the photographs, or a file with them"
    )
    rec.add_argument("--shared-camera", action="store_true", help="one camera took all images")
    rec.add_argument("--square-pixels", action="store_true", help="one focal length for both directions")
    rec.add_argument("--scale", metavar="A,B=1.25m", help="distance between the cameras of two images (m, cm, ft, ...)")
    rec.add_argument("--positions", help="known positions of cameras: lines of name x y z, or of GPS, or poses")


def _add_output(rec: argparse.ArgumentParser) -> None:
    rec.add_argument("--formats", help=f"with commas, or all (default: {FORMATS}; in windows tum for png)")
    rec.add_argument(
        "--images", default="link", choices=export.IMAGES, help="how images/ is filled (default: hard links)"
    )
    rec.add_argument("--points", default="depth", choices=("depth", "head"), help="where points come from")
    rec.add_argument(
        "--conf-percentile", type=float, default=30.0, help="leave out this percentage of the least sure pixels"
    )
    rec.add_argument(
        "--edge-filter", type=float, metavar="JUMP", help="leave out edges where depth jumps by this share; try 0.09"
    )
    rec.add_argument(
        "--refine", metavar="ba", help="adjust the bundle to tracks measured in the images (needs pycolmap)"
    )
    rec.add_argument(
        "--tracks",
        default="auto",
        metavar="auto|measure|project",
        help="observations of the COLMAP model (default: auto)",
    )
    rec.add_argument("--max-points", type=int, default=1_000_000, help="thin the cloud (default: %(default)s)")
    rec.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    rec.add_argument("--dry-run", action="store_true", help="say how large it is and what would be written, and stop")


def run(args: argparse.Namespace) -> None:
    """Check everything, load the model once, and make each scene; a line of JSON on stdout for each."""
    from geoaccel.sharding.launch import session

    check_windows(args)
    args.formats = args.formats or FORMATS
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
        model = processes.shared(_load(args, device, dtype, say if processes.speaks else silent))
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
            say(f"{job.out.name}: {' '.join(str(error).split())}")
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
        loaded, merging=split_names(args.merging), quantization=args.quantization, attention=args.attention, **chosen
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
    from geoaccel import reconstruct
    from geoaccel.backbone import ARBITRARY

    def on_read(inputs: Any) -> None:
        if not processes.speaks:
            return
        (height, width), left_out = inputs.batch.images.shape[-2:], inputs.batch.left_out
        frames = len(job.pictures) - len(left_out)
        for name, why in left_out.items():
            say(f"left out {name}: {why}")
        say(f"{frames} x {height} x {width} pixels; running {args.model} in {dtype} on {device}")

    options = {name: getattr(args, name) for name in OPTIONS}
    options |= {"fps": job.fps, "progress": processes.speaks and sys.stderr.isatty()}
    source, options = processes.given(job.pictures, model, options)
    own = reconstruct(source, model=model, **options, on_read=on_read)
    result = processes.whole(own, source)
    if result is None:
        return
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
        "points": len(cloud),
        "kept_share": cloud.kept_share,
        "formats": list(formats),
    }
    print(json.dumps(summary), flush=True)


def silent(line: str) -> None:
    """What a process says that is not the first of its group."""


def _say_agreement(found: dict[str, Any], unit: str) -> None:
    wrong = found["wrong"]
    say(
        f"{found['known'] - len(wrong)} of {found['known']} positions agree, half of them within "
        f"{found['median_error']:.3g} (unit: {unit})"
    )
    for name, error in sorted(wrong.items(), key=lambda item: -item[1]):
        say(f"position of {name} is off by {error:.3g} and was not used")
    if found["on_a_line"]:
        say("warning: the positions lie on a line; how the scene is turned about it is not known")


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
