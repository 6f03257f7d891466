"""Time of a quantized forward against a dense one: CPU seconds of one thread, alternating, medians.

    python scripts/figures/quantization_time.py vggt-mini pi3-mini --out benchmarks/quantization-time-cpu.json

One validation scene of 8 frames of 224 x 224 pixels. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel import accelerate, list_quantization, load_model
from geoaccel.atomic import write_text
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS, sequence

FRAMES, SIZE, DENSE = 8, (224, 224), "dense"


@torch.inference_mode()
def processor_seconds(
    models: dict[str, nn.Module],
    images: Tensor,  # [1, S, 3, H, W]
    rounds: int,
) -> dict[str, float]:
    """Median over rounds with one run of each model, after a warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            began = time.process_time()
            model(images)
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a checkpoint, dense and with each quantization, and relative to dense."""
    models = {DENSE: load_model(name)}
    models |= {method: accelerate(load_model(name), quantization=method) for method in list_quantization()}
    images = sequence(VALIDATION_SEEDS[0], frames=FRAMES, size=SIZE).images
    seconds = processor_seconds(models, images, rounds)
    return {method: {"cpu_s": taken, "over_dense": taken / seconds[DENSE]} for method, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, Any] = {name: measure(name, args.rounds) for name in args.models}
    finally:
        torch.set_num_threads(threads)
    print("| | processor seconds | dense forwards |\n|---|---|---|")
    for name, rows in found.items():
        for method, row in rows.items():
            print(f"| `{name}`, `{method}` | {row['cpu_s']:.2f} | {row['over_dense']:.2f} |")
    if args.out is not None:
        command = f"python scripts/figures/quantization_time.py {' '.join(args.models)} --out {args.out}"
        document = {"command": command, "made": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rows": found}
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_program("quantization_time", main))
