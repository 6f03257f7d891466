"""The command line. Exit codes: 0 done, 2 the input is wrong (one line on stderr), 1 anything else (a traceback)."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from geoaccel.console import expand, say, split_names
from geoaccel.errors import run_program
from geoaccel.runtime import pick_device
from geoaccel.version import __version__

# What Ctrl-C leaves, where it is not nothing.
INTERRUPTED = {
    "eval": "predictions of finished scenes are kept, and the same command goes on from there",
    "bench": "what was timed is lost; reports of runs that were finished are kept",
}
BUSY = 0.1  # spread of times over their median


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"geoaccel: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    from geoaccel.eval.tools.quantize import add_options
    from geoaccel.eval.tools.tune import add_options as add_tune
    from geoaccel.reconstruct_command import add_options as add_reconstruct

    top = Parser(prog="geoaccel", description="Fast, small, measured feed-forward 3D reconstruction.")
    top.add_argument("--version", action="version", version=f"geoaccel {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", help="reconstruct a rendered scene with the model in the package")
    demo.add_argument("--out", default="geoaccel-demo", help="output folder (default: %(default)s)")
    demo.add_argument("--model", default="vggt-mini", help="embedded name or checkpoint (default: %(default)s)")
    demo.add_argument("--merging", default="asymmetric", help="methods to compare with, comma-separated, or none")
    demo.add_argument("--scene", type=int, default=0, help="seed of the scene (default: %(default)s)")
    demo.add_argument("--frames", type=int, default=64, help="photographs to render (default: %(default)s)")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    demo.set_defaults(run=run_demo)

    rec = commands.add_parser("reconstruct", help="photographs to cameras, depth and points")
    add_reconstruct(rec)
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
    from geoaccel.reconstruct_command import run

    run(args)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and turn errors into exit codes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # A polite kill must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parser().parse_args(argv)
    left = INTERRUPTED.get(args.command, "nothing was left behind")
    if getattr(args, "window", None) is not None:
        left = "finished windows are kept, and the same command goes on from there"
    return run_program("geoaccel", partial(args.run, args), interrupted=left)


if __name__ == "__main__":
    sys.exit(main())
