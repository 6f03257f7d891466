"""The ablation of calibrated quantization: rounding, AWQ, token filter, task-aware search, mixed precision.

    python scripts/figures/quantization_ablation.py vggt-mini --out benchmarks/quantization-vggt-mini
    python scripts/figures/quantization_ablation.py vggt-mini --out runs/smoke --scenes 2 --seeds 1 --shortlist 1
    python scripts/figures/quantization_ablation.py vggt-mini --out runs/three --rows rtn awq default

Writes `<out>.json` and `<out>.md`. If interrupted, the same command resumes with the missing rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path

import torch

from geoaccel.atomic import write_text
from geoaccel.errors import run_program
from geoaccel.eval.run.made_by import EFFECTS, made_by, write_record
from geoaccel.eval.tools.ablation import ROWS, Ablation, ablation_table, run_ablation
from geoaccel.models.files import fingerprint
from geoaccel.models.weights import load_model
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.runtime import in_words


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measure(model: str, out: Path, ablation: Ablation) -> None:
    """Run what is missing, and write both files."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out={out}: there is no folder {out.parent}; create it first")
    weights = fingerprint(model)
    machine = made_by("cpu", EFFECTS)
    settings = {"model": model, "weights": weights, **dataclasses.asdict(ablation)}
    progress = Progress(f"{out}.progress", {**settings, **machine})
    network = load_model(model, dtype=torch.float32)
    document = run_ablation(network, ablation, progress=progress, report=say)
    command = shlex.join(["python", "scripts/figures/quantization_ablation.py", *sys.argv[1:]])
    made = {"model": model, "weights": weights, "made": time.strftime("%Y-%m-%d"), "command": command}
    write_record(out.with_name(f"{out.name}.json"), machine, {**made, **document})
    notes = [f"`{command}`", f"{made['made']}, weights {weights}, code {machine['code']}, float32, {in_words(machine)}"]
    write_text(out.with_name(f"{out.name}.md"), ablation_table(document, f"Quantization of {model}", notes))
    progress.finish()
    print(f"wrote {out}.json and {out}.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="embedded name, hub id or file")
    parser.add_argument("--out", required=True, help="files to write, without suffix")
    parser.add_argument("--rows", nargs="+", default=ROWS, help=f"rows to measure, of: {' '.join(ROWS)}; default: all")
    sizes = [field for field in dataclasses.fields(Ablation) if field.name != "rows"]
    for field in sizes:
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default, help="default: %(default)s")
    args = parser.parse_args()

    def work() -> None:
        ablation = Ablation(rows=tuple(args.rows), **{field.name: getattr(args, field.name) for field in sizes})
        measure(args.model, Path(args.out), ablation)

    sys.exit(run_program("quantization_ablation", work))


if __name__ == "__main__":
    main()
