"""Options of ``demo``, ``eval``, ``bench`` and ``tune``."""

from __future__ import annotations

import argparse

from geoaccel.options.common import MODEL, add_device, add_dtype, add_overwrite
from geoaccel.options.names import MERGING, listed, one_of

DEMO = (
    "geoaccel demo",
    "geoaccel demo --merging httm,asymmetric --frames 32 --out look --overwrite",
)
EVAL = (
    "geoaccel eval data=folder data.root=photos model=facebook/VGGT-1B merging=asymmetric fidelity=true",
    "geoaccel eval --multirun merging=none,httm,asymmetric data.frames=8,32 out=runs/compared",
)
BENCH = (
    "geoaccel bench model=vggt-mini frames=[8,32] methods=[httm,asymmetric]",
    "geoaccel bench model=vggt size=[350,518] frames=[10,100] device=cuda",
)
TUNE = (
    "geoaccel tune photos/ --model facebook/VGGT-1B --max-pose-error 0.5deg --out plan.yaml",
    "geoaccel tune kitchen/ garden/ --model vggt-mini --speedup 1.5 --out plan.yaml",
)


def add_demo(demo: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    demo.add_argument("--out", default="geoaccel-demo", help="output folder (default: %(default)s)")
    demo.add_argument("--model", default="vggt-mini", help=f"{MODEL} (default: %(default)s)")
    demo.add_argument(
        "--merging",
        default="asymmetric",
        metavar="METHODS",
        type=one_of("merging method", MERGING, "merging"),
        help=f"methods to compare with, comma-separated, or none (default: %(default)s){listed(MERGING)}",
    )
    demo.add_argument("--scene", type=int, default=0, help="seed of the scene (default: %(default)s)")
    demo.add_argument("--frames", type=int, default=88, help="photographs to render (default: %(default)s)")
    add_device(demo)
    add_overwrite(demo)


def add_settings(command: argparse.ArgumentParser, name: str) -> None:
    """Options of ``eval`` and ``bench``, which are told the rest by ``key=value``."""
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example merging=httm; --cfg shows all of them"
    )
    command.add_argument("--config", help=f"another file in configs/, such as ablation (default: {name})")
    command.add_argument("--multirun", "-m", action="store_true", help="every combination of key=a,b,c")
    command.add_argument("--cfg", action="store_true", help="show the settings and stop")


def add_tune(tune: argparse.ArgumentParser) -> None:
    """Options of ``tune``."""
    tune.add_argument(
        "input", nargs="+", metavar="FOLDER", help="folder of photographs, one scene each; four photographs or more"
    )
    tune.add_argument("--model", default="vggt-mini", help=f"{MODEL} (default: %(default)s)")
    tune.add_argument("--out", required=True, help="plan to write, *.yaml; measurements (.json, .png) go beside it")
    budget = tune.add_argument_group("budget, one or more of")
    budget.add_argument("--max-pose-error", metavar="DEG", help="of cameras against the dense model, e.g. 0.5deg")
    budget.add_argument("--max-depth-error", metavar="PERCENT", help="of depth against the dense model, e.g. 1%%")
    budget.add_argument("--speedup", metavar="X", help="minimum speedup, e.g. 4")
    budget.add_argument("--max-memory", metavar="SIZE", help="weights and activations, e.g. 16GB: quantizes if need be")
    run = tune.add_argument_group("run")
    run.add_argument("--frames", type=int, help="photographs at a time (default: half of a folder, at most 16)")
    run.add_argument("--measured", metavar="FILE", help="*.json beside an earlier plan: reuse its measurements")
    add_device(run)
    add_dtype(run)
    add_overwrite(run, "plan")
