"""The command line. Exit codes: 0 done, 2 the input is wrong (one line on stderr), 1 anything else (a traceback)."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from geoaccel.conditions import KINDS
from geoaccel.errors import UserError, run_program
from geoaccel.runtime import DTYPES, pick_device, pick_dtype
from geoaccel.version import __version__

if TYPE_CHECKING:
    from geoaccel.sharding.launch import Session

# What Ctrl-C leaves, where it is not nothing.
INTERRUPTED = {
    "eval": "predictions of finished scenes are kept, and the same command goes on from there",
    "bench": "what was timed is lost; reports of runs that were finished are kept",
}
BUSY = 0.1  # spread of times over their median
LARGEST_SIZE = 8  # times the size that a model was made for


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"geoaccel: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    from geoaccel.eval.tools.quantize import add_options
    from geoaccel.eval.tools.tune import add_options as add_tune

    top = Parser(prog="geoaccel", description="Fast, small, measured feed-forward 3D reconstruction.")
    top.add_argument("--version", action="version", version=f"geoaccel {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", help="reconstruct a rendered scene with the model in the package")
    demo.add_argument("--out", default="geoaccel-demo", help="output folder (default: %(default)s)")
    demo.add_argument("--model", default="vggt-mini", help="embedded name or checkpoint (default: %(default)s)")
    demo.add_argument("--merging", default="asymmetric", help="methods to compare with, comma-separated, or none")
    demo.add_argument("--scene", type=int, default=0, help="seed of the scene (default: %(default)s)")
    demo.add_argument("--frames", type=int, default=32, help="photographs to render (default: %(default)s)")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    demo.set_defaults(run=run_demo)

    rec = commands.add_parser("reconstruct", help="photographs to cameras, depth and points")
    rec.add_argument("input", nargs="+", metavar="INPUT", help="folder of images, image files, glob, or one video")
    rec.add_argument("--out", required=True, help="output folder; must be new or empty")
    rec.add_argument("--model", default="vggt-mini", help="embedded name, hub id or file (default: %(default)s)")
    rec.add_argument("--merging", help="token merging method, or several as alike,httm")
    rec.add_argument("--quantization", help="quantization method")
    rec.add_argument("--layers", help="methods of single layers, as '{0-8: frame-only, 9-23: httm}', or a preset")
    rec.add_argument("--plan", help="file of geoaccel tune, in place of --merging, --layers and --quantization")
    rec.add_argument("--attention", help="attention kernel: sdpa (default), xformers, matmul or fp8")
    rec.add_argument("--formats", default="ply,glb,colmap,png", help="comma-separated (default: %(default)s)")
    rec.add_argument("--points", default="depth", choices=("depth", "head"), help="where points come from")
    rec.add_argument(
        "--conf-percentile", type=float, default=30.0, help="leave out this percentage of the least sure pixels"
    )
    rec.add_argument(
        "--edge-filter", type=float, metavar="JUMP", help="leave out edges where depth jumps by this share; try 0.09"
    )
    rec.add_argument(
        "--reference", default="first", help="frame that comes first: first, auto or a number (default: first)"
    )
    rec.add_argument("--drop-outliers", action="store_true", help="leave out images that are unlike the others")
    rec.add_argument("--masks", help="folder with a mask for each photograph; bright pixels are kept")
    rec.add_argument("--poses", help="known poses: transforms.json or poses.json; of some images or of all")
    rec.add_argument("--intrinsics", help="known intrinsics: such a file, or f or fx,fy,cx,cy in pixels of all images")
    rec.add_argument("--depths", help="folder of known depths: .npy in the unit of the poses, or 16-bit .png in mm")
    rec.add_argument("--max-points", type=int, default=1_000_000, help="thin the cloud (default: %(default)s)")
    rec.add_argument("--fps", type=float, help="frames per second to take of a video")
    rec.add_argument("--max-frames", type=int, help="use at most this many images, evenly spread")
    rec.add_argument("--size", type=int, help="width or long side of the network input in pixels")
    rec.add_argument(
        "--mode", choices=("crop", "pad", "budget", "long"), help="how images are fitted (default: the model's)"
    )
    rec.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    rec.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA, float32 on CPU")
    rec.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    rec.set_defaults(run=run_reconstruct)

    for name, what in (("eval", "score a model and its methods"), ("bench", "time methods over frame counts")):
        command = commands.add_parser(name, help=f"{what}: key=value settings of configs/{name}.yaml")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example merging=httm")
        command.add_argument("--config", help=f"another file of configs, such as ablation (default: {name})")
        command.add_argument("--multirun", "-m", action="store_true", help="every combination of key=a,b,c")
        command.add_argument("--cfg", action="store_true", help="show the settings and stop")
        command.set_defaults(run=run_measurement)

    add_tune(commands)
    add_options(commands, Parser)

    info = commands.add_parser("info", help="what is installed, which kernels work, what a checkpoint is")
    info.add_argument("model", nargs="?", help="embedded name, hub id or file to describe")
    info.add_argument("--backbones", action="store_true", help="a table of published checkpoints and what they cost")
    info.set_defaults(run=run_info)
    return top


def split_names(text: str | None) -> list[str]:
    """Comma-separated names; ``none`` is no name."""
    return [name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none")]


def run_demo(args: argparse.Namespace) -> None:
    from geoaccel.eval.tools.demo import run_demo as demo

    out = expand(args.out)
    result = demo(
        out,
        model=args.model,
        scene=args.scene,
        merging=split_names(args.merging),
        frames=args.frames,
        device=pick_device(args.device),
        overwrite=args.overwrite,
        report=say,
    )
    dense = result.trials[0]
    rows: list[tuple[str, Callable[[Any], str]]] = [
        ("", lambda trial: trial.name),
        ("pose AUC@30 (1 is perfect)", lambda trial: f"{trial.scores['auc_30']:.3f}"),
        ("pose AUC@5", lambda trial: f"{trial.scores['auc_5']:.3f}"),
        ("median rotation error", lambda trial: f"{trial.scores['rotation_median_deg']:.1f} deg"),
        ("depth error (AbsRel)", lambda trial: f"{100 * trial.scores['depth_abs_rel']:.1f} %"),
        ("queries left out", lambda trial: f"{100 * (trial.effective_ratio or 0):.0f} %"),
        ("keys left out", lambda trial: f"{100 * (trial.effective_key_ratio or 0):.0f} %"),
        ("time, median of 5", lambda trial: f"{trial.latency_s:.2f} s"),
        ("speedup", lambda trial: f"{dense.latency_s / trial.latency_s:.2f}x"),
        ("peak memory", lambda trial: f"{trial.peak_memory_gib:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}" + "".join(f"  {text(trial):>10}" for trial in result.trials))
    print(f"  {result.points:,} points kept, {100 * result.kept_share:.0f} % of the pixels")
    for path in result.files:
        print(f"wrote {path}")
    spread = max(trial.spread_s / trial.latency_s for trial in result.trials)
    if spread > BUSY:
        say(f"times varied by {100 * spread:.0f} %: the machine was busy, and the speedup is rough")
    merging = f" --merging {args.merging}" if len(result.trials) > 1 else ""
    print(f"the same from files:  geoaccel reconstruct {out / 'photos'} --model {args.model}{merging} --out scene")
    print(f"your photographs:     geoaccel reconstruct photos/ --model facebook/VGGT-1B{merging} --out scene")


def run_reconstruct(args: argparse.Namespace) -> None:
    from geoaccel import export
    from geoaccel.checks import check_options, named_files
    from geoaccel.sharding.launch import session

    formats = check_options(args, split_names(args.merging))
    out, masks = expand(args.out), expand(args.masks) if args.masks else None
    with session() as processes:
        if processes.speaks:
            export.check_output_folder(out, overwrite=args.overwrite, needed=named_files(args, masks))
        with processes.claimed(partial(export.claimed, out)):
            reconstruct_into(out, masks, formats, args, processes)


def reconstruct_into(
    out: Path, masks: Path | None, formats: Sequence[str], args: argparse.Namespace, processes: Session
) -> None:
    """The work of ``reconstruct``, while no other process may write to its folder but those of the same command."""
    import dataclasses
    import time

    import torch

    from geoaccel import accelerate, load_model, reconstruct
    from geoaccel.backbone import ARBITRARY
    from geoaccel.checks import VIDEO_FPS, check_input, is_video_without_a_choice
    from geoaccel.fingerprint import of_json
    from geoaccel.images import load_masks
    from geoaccel.memory import check_memory
    from geoaccel.reconstruction import check_takes
    from geoaccel.tuned import TunedPlan

    tell = say if processes.speaks else silent
    device = processes.device(args.device)
    dtype = pick_dtype(args.dtype, device)
    chosen = {"layers": read_layers(args.layers), "plan": TunedPlan.read(args.plan) if args.plan else None}
    if is_video_without_a_choice(args):
        args.fps = VIDEO_FPS
        tell(f"taking {VIDEO_FPS:g} frames a second of the video; choose with --fps or --max-frames")
    pictures = check_input(args, out if processes.speaks else None, masks, formats)
    processes.agree("number of images", len(pictures))
    processes.agree("list of images", of_json([picture.name for picture in pictures]))
    model = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    if (better := for_photographs(args.model, model)) is not None:
        tell(f"warning: {args.model} is a test instrument; for photographs use --model {better}")
    model = accelerate(
        model, merging=split_names(args.merging), quantization=args.quantization, attention=args.attention, **chosen
    )
    conditions = {kind: value for kind in KINDS if (value := getattr(args, kind)) is not None}
    check_takes(model, conditions)
    preprocess: Any = model.preprocess
    preprocess = dataclasses.replace(preprocess, mode=args.mode or preprocess.mode)
    if args.size is not None:
        if args.size < preprocess.patch_size or args.size % preprocess.patch_size:
            patch = preprocess.patch_size
            raise UserError(
                f"--size {args.size} is no multiple of the patch size {patch}; try {max(1, args.size // patch) * patch}"
            )
        if args.size > LARGEST_SIZE * preprocess.size:
            raise UserError(
                f"--size {args.size} is more than {LARGEST_SIZE} times the size that the model was made for, "
                f"{preprocess.size}; give at most {LARGEST_SIZE * preprocess.size}"
            )
        preprocess = dataclasses.replace(preprocess, size=args.size, max_pixels=args.size**2)
    progress = processes.speaks and sys.stderr.isatty()
    options = {"fps": args.fps, "max_frames": args.max_frames, "progress": progress}
    # The forward runs where the model is; what cannot fit is refused after the first image.
    batch = processes.load(pictures, preprocess, **options, fits=partial(check_memory, model, unread=True))
    mask = load_masks(masks, batch) if masks else None
    model = processes.shared(model)
    frames, (height, width) = len(pictures), batch.images.shape[-2:]
    shape = f"{frames} x {height} x {width} pixels"
    tell(f"{shape}; running {args.model} in {dtype} on {device}")
    began = time.perf_counter()
    chosen_frames: Any = {"reference": args.reference, "drop_outliers": args.drop_outliers}
    result = reconstruct(batch, model=model, points=args.points, conditions=conditions, **chosen_frames)
    if mask is not None and len(result) < len(batch):
        mask = mask[[batch.names.index(name) for name in result.names]]
    seconds = time.perf_counter() - began
    together = processes.whole(result, batch, mask)
    if together is None:
        return
    result, mask = together
    if args.edge_filter is not None:
        before = int(result.mask.sum())
        result = result.without_edges(args.edge_filter)
        share = 100 * (1 - int(result.mask.sum()) / before)
        print(f"{share:.1f} % of the pixels are at depth edges and left out (--edge-filter {args.edge_filter:g})")
    cloud = result.save(
        out,
        formats,
        overwrite=args.overwrite,
        conf_percentile=args.conf_percentile,
        mask=mask,
        max_points=args.max_points,
    )
    print(
        f"{len(result)} cameras in {seconds:.1f} s; {100 * cloud.kept_share:.0f} % of the pixels kept "
        f"(--conf-percentile {args.conf_percentile:g}), {len(cloud):,} points written"
    )
    if result.unit != ARBITRARY:
        print(f"unit: {result.unit}")
    if (traffic := processes.traffic(model)) is not None:
        print(traffic)
    for path in sorted(out.iterdir()):
        print(f"wrote {path}{'/' if path.is_dir() else ''}")


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


def expand(path: str) -> Path:
    """With the home folder for ``~``: a shell leaves it as it is in ``--out=~/scene``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names the home folder of a user who is not known here; write it out") from None


def run_measurement(args: argparse.Namespace) -> None:
    from geoaccel.eval.tools.command import run_command

    line = run_command(args.command, args.overrides, config=args.config, multirun=args.multirun, show=args.cfg)
    print(line, flush=True)


def run_info(args: argparse.Namespace) -> None:
    from geoaccel.info import describe_backbones, describe_checkpoint, describe_machine

    if args.backbones:
        print(describe_backbones())
        return
    print(describe_checkpoint(args.model) if args.model else describe_machine())


def say(line: str) -> None:
    """Progress bar on stderr."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """What a process says that is not the first of its group."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and turn errors into exit codes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # A polite kill must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parser().parse_args(argv)
    left = INTERRUPTED.get(args.command, "nothing was left behind")
    return run_program("geoaccel", partial(args.run, args), interrupted=left)


if __name__ == "__main__":
    sys.exit(main())
