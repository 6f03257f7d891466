"""Memory of a forward on a CPU, measured against predicted: everything at once, and with each plan.

    python scripts/figures/measure_resident.py --out benchmarks/memory-cpu.json

Each run is a separate process: the model is loaded and warmed up on two frames, then the resident memory is sampled
every 5 ms while it runs on all of them. The prediction and a checksum of the outputs are also recorded. Rows already in
the file are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import run_program
from geoaccel.eval.bench.speed import peak_memory
from geoaccel.memory import activation_bytes, in_use, planned
from geoaccel.models.weights import load_model

MIB = 2**20
SIZE = (224, 224)
PLANS = 4
"""Everything at once, and the three memory plans on a CPU."""


def run(name: str, frames: int, index: int) -> dict[str, Any]:
    """One row, measured in this process."""
    torch.set_num_threads(1)
    model: Any = load_model(name)
    plan = [None, *model.memory_plans("cpu")][index]
    images = torch.rand(frames, 3, *SIZE, generator=torch.Generator().manual_seed(frames))
    cpu = torch.device("cpu")
    with torch.inference_mode(), planned(model, plan):
        model(images[:2])
        before = in_use(cpu)
        with peak_memory(cpu) as peak:
            outputs = model(images)
    numbers = hashlib.sha256()
    for key in sorted(outputs):
        if isinstance(outputs[key], torch.Tensor):
            numbers.update(outputs[key].contiguous().numpy().tobytes())
    return {
        "model": name,
        "frames": frames,
        "plan": None if plan is None else str(plan),
        "resident_mib": round((peak[0] - before) / MIB),
        "predicted_mib": round(activation_bytes(model, frames, SIZE, "cpu", plan=plan) / MIB),
        "outputs": numbers.hexdigest()[:16],
    }


def measure(models: list[str], counts: list[int], out: Path) -> None:
    """Run the missing rows; each is written at once."""
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for name in models:
        for frames in counts:
            there = sum((row["model"], row["frames"]) == (name, frames) for row in rows)
            for index in range(there, PLANS):
                command = [sys.executable, __file__, "--run", name, str(frames), str(index)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vggt-mini", "pi3-mini"], help="default: both minis")
    parser.add_argument("--frames", nargs="+", type=int, default=[32, 64, 128], help="default: 32 64 128")
    parser.add_argument("--out", type=Path, default=Path("memory-cpu.json"), help="default: %(default)s")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "FRAMES", "PLAN"), help="one row, in this process")
    args = parser.parse_args()
    if args.run is not None:
        name, frames, index = args.run
        print(json.dumps(run(name, int(frames), int(index))))
    else:
        measure(args.models, args.frames, args.out)


if __name__ == "__main__":
    sys.exit(run_program("measure_resident", main))
