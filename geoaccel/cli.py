"""The command line. Exit codes: 0 done, 2 the input is wrong (one line on stderr), 1 anything else (a traceback)."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from shlex import quote
from typing import Any

from geoaccel.console import expand, say, set_verbosity, split_names, warn
from geoaccel.errors import run_program
from geoaccel.options import make_parser, subcommands
from geoaccel.options.parser import Parser

# What Ctrl-C leaves behind, if anything.
INTERRUPTED = {
    "eval": "predictions of finished scenes are kept; the same command resumes from there",
    "bench": "timings of this run are lost; reports of finished runs are kept",
    "tune": "earlier results are kept; the same command resumes from there",
}
BUSY = 0.1  # spread of times over their median


def parser() -> Parser:
    """All commands and options, each with what runs it."""
    top = make_parser()
    runs = {
        "demo": run_demo,
        "reconstruct": run_reconstruct,
        "view": run_view,
        "eval": run_measurement,
        "bench": run_measurement,
        "tune": run_tune,
        "quantize": run_quantize,
        "info": run_info,
        "completion": run_completion,
    }
    for name, command in subcommands(top).items():
        command.set_defaults(run=runs[name])
    return top


def run_demo(args: argparse.Namespace) -> None:
    from geoaccel.eval.tools.demo import run_demo as demo
    from geoaccel.runtime import pick_device

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
        ("queries removed", lambda trial: f"{100 * (trial.effective_ratio or 0):.0f} %"),
        ("keys removed", lambda trial: f"{100 * (trial.effective_key_ratio or 0):.0f} %"),
        (f"time, median of {dense.runs}", lambda trial: f"{trial.latency_s:.2f} s"),
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
        warn(f"times varied by {100 * spread:.0f} %: the machine was busy, and the speedup is unreliable")
    folder, photos = quote(str(out)), quote(str(out / "photos"))
    print(f"look at it:           geoaccel view {folder}")
    merging = f" --merging {args.merging}" if len(result.trials) > 1 else ""
    print(f"the same from files:  geoaccel reconstruct {photos} --model {quote(args.model)}{merging} --out scene")
    print(f"your photographs:     geoaccel reconstruct photos/ --model facebook/VGGT-1B{merging} --out scene")


def run_reconstruct(args: argparse.Namespace) -> None:
    from geoaccel.reconstruct_command import run

    run(args)


def run_view(args: argparse.Namespace) -> None:
    from geoaccel.viewer.command import run

    run(args)


def run_measurement(args: argparse.Namespace) -> None:
    from geoaccel.eval.run.overrides import check_overrides

    check_overrides(args.config or args.command, args.overrides)  # before everything is imported
    from geoaccel.eval.tools.command import run_command

    line = run_command(args.command, args.overrides, config=args.config, multirun=args.multirun, show=args.cfg)
    print(line, flush=True)


def run_tune(args: argparse.Namespace) -> None:
    from geoaccel.eval.tools.tune import run_tune as tune

    tune(args)


def run_quantize(args: argparse.Namespace) -> None:
    from geoaccel.eval.tools.quantize import run_export, run_sensitivity

    run_sensitivity(args) if args.action == "sensitivity" else run_export(args)


def run_completion(args: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(make_parser(), args.shell))


def run_info(args: argparse.Namespace) -> None:
    from geoaccel.info import describe_backbones, describe_checkpoint, describe_machine

    if args.backbones:
        print(describe_backbones())
        return
    print(describe_checkpoint(args.model) if args.model else describe_machine())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and turn errors into exit codes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # SIGTERM must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parser().parse_args(argv)
    left = INTERRUPTED.get(args.command, "nothing was left behind")
    if args.command == "reconstruct" and args.scenes:
        again = "without --overwrite " if args.overwrite else ""
        left = f"finished scenes are kept; the same command {again}resumes from there"
    elif getattr(args, "window", None) is not None:
        left = "finished windows are kept; the same command resumes from there"
    return run_program("geoaccel", partial(_run, args), interrupted=left)


def _run(args: argparse.Namespace) -> None:
    set_verbosity(quiet=args.quiet, verbose=args.verbose)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
