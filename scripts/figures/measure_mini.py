"""All results of a mini checkpoint that depend on its weights, to be run after they changed.

    python scripts/figures/measure_mini.py vggt-mini
    python scripts/figures/measure_mini.py pi3-mini --out runs/figures --steps scores merging

Trains Co-Me's predictor, which depends on the weights, then writes into `benchmarks/`: scores of the float and of the
quantized network, the cost of every merging method, the ablation of calibration, the sensitivity of every block. If
interrupted, the same command resumes. It takes hours, and more than 10 GB for the predictions of a model; with two
cores run one model on each.
`scripts/figures/mini_tables.py --write` then puts the tables into the documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geoaccel.atomic import write_text
from geoaccel.errors import UserError, run_program
from geoaccel.eval.report import json_line
from geoaccel.eval.run.made_by import SCORES, code, made_by, read_record, write_record
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.run.source import Kept
from geoaccel.eval.tools.evaluation import run_plan
from geoaccel.models.files import fingerprint
from geoaccel.runtime import hardware

BENCHMARKS = Path("benchmarks")
SCORED: dict[str, list[str]] = {
    "float": [],
    "frame-only": ["control=frame-only"],
    "32 frames": ["data.frames=32"],
    "fp8": ["quantization=fp8"],
    "w4a16": ["quantization=w4a16"],
    "w4a16, calibrated": [],  # of the calibrated file
}

MERGING_SET = "test"
MERGED: dict[int, tuple[str, ...]] = {
    64: ("published", "ours", "compositions", "litevggt, released choice", "alike, random groups"),
    16: ("ablations",),
}
"""By number of scenes, the variants of `merging_variants.py` measured on them."""


def run(*command: str) -> str:
    """Stdout of a command that succeeds; its stderr passes through.

    Raises:
        CalledProcessError: If it does not.
    """
    print(" ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def evaluate(overrides: list[str], kept: dict[str, Kept]) -> dict[str, Any]:
    """The line that `geoaccel eval` prints, on scenes that are rendered once for all evaluations that want the same."""
    plan = Plan.from_settings(compose_settings("eval", overrides))
    source: Any = kept.setdefault(f"{len(plan.source)} of {plan.source.describe()}", Kept(plan.source))
    (row,) = run_plan(dataclasses.replace(plan, source=source), shlex.join(["geoaccel", "eval", *overrides]))
    return json.loads(json_line(row))


def once(record: Path, work: Callable[[], object]) -> None:
    """Run the steps that this code has not run yet."""
    made = {"code": code()}
    if read_record(record, made) is None:
        work()
        write_record(record, made, {})


def predictor(model: str, out: Path) -> None:
    """Co-Me's predictor, in the package."""
    once(
        out / "predictor.json",
        lambda: run(sys.executable, "scripts/training/train_confidence.py", f"model={model}", "out=shipped"),
    )


def scores(model: str, out: Path) -> None:
    """Accuracy of the float network at 8 and 32 frames, blind to other frames, and quantized; 64 are with `merging`."""
    calibrated = out / "w4.safetensors"
    options = ("--model", model, "--quantization", "w4a16", "--out", str(calibrated), "--overwrite")
    once(out / "w4.json", lambda: run("geoaccel", "quantize", "calibrate", *options))
    rows = {}
    kept: dict[str, Kept] = {}
    for name, settings in SCORED.items():
        scored = str(calibrated) if name == "w4a16, calibrated" else model
        folder = out / name.replace(", ", "-").replace(" ", "-")
        row = evaluate(["data=synthetic", f"model={scored}", "timing.repeats=0", f"out={folder}", *settings], kept)
        rows[name] = {key: value for key, value in row.items() if value is not None} | {"model": model}
    document = {
        **{"model": model, "weights": fingerprint(model), "made": time.strftime("%Y-%m-%d")},
        **{"hardware": hardware("cpu"), "rows": rows},
    }
    write_record(BENCHMARKS / f"scores-{model}.json", made_by("cpu", SCORES), document)


def merging(model: str, out: Path) -> None:
    """Measure every method at 64 frames, and its parts on fewer scenes."""
    folder = out / "merging"
    common = ("--set", MERGING_SET, "--out", str(folder))
    for scenes, variants in MERGED.items():
        options = ("--frames", f"64:{scenes}", "--variants", *variants)
        run(sys.executable, "scripts/figures/measure_frames.py", "measure", model, *options, *common)
    run(sys.executable, "scripts/figures/measure_frames.py", "summary", Path(model).stem, *common, "--to", str(folder))
    found = json.loads((folder / "benchmarks" / f"merging-{model}-frames-{MERGING_SET}.json").read_text())
    document = {"rows": found.pop("frames")["64"], **found}
    write_text(BENCHMARKS / f"merging-{model}-64frames.json", json.dumps(document, indent=1) + "\n")


def quantization(model: str, out: Path) -> None:
    """Measure each step of calibration, and those that decide over more calibration sets."""
    wanted = {
        f"quantization-{model}": ("--seeds", "2", "--sensitivity-scenes", "4"),
        f"quantization-{model}-five-sets": ("--rows", "rtn", "awq", "default"),
    }
    for name, options in wanted.items():
        where = ("--out", str(BENCHMARKS / name))
        run(sys.executable, "scripts/figures/quantization_ablation.py", model, *where, "--scenes", "24", *options)


def sensitivity(model: str, out: Path) -> None:
    """The effect of each block alone."""
    options = ("--model", model, "--quantization", "w4a16", "--scenes", "8", "--overwrite")
    run("geoaccel", "quantize", "sensitivity", *options, "--out", str(BENCHMARKS / f"sensitivity-{model}.json"))


STEPS: dict[str, Callable[[str, Path], None]] = {
    step.__name__: step for step in (predictor, scores, merging, quantization, sensitivity)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("vggt-mini", "pi3-mini"))
    parser.add_argument("--out", default="runs/figures", type=Path, help="predictions; default: %(default)s")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="default: all of them")
    args = parser.parse_args()
    if not BENCHMARKS.is_dir():
        raise UserError("run it from the root of the repository")
    # Results of other weights must not be resumed.
    out = args.out / f"{args.model}-{fingerprint(args.model)}"
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        for step in args.steps:
            STEPS[step](args.model, out)
    except subprocess.CalledProcessError as error:
        raise UserError(str(error)) from None  # it has said why on stderr


if __name__ == "__main__":
    sys.exit(run_program("measure_mini", main))
