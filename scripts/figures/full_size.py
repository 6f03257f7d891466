"""Run a backbone at its published size with random weights: does it fit, how long does it take, is the estimate right?

    python scripts/figures/full_size.py vggt --frames 8 --height 392 --width 518 --dtype bfloat16
    python scripts/figures/full_size.py vggt --frames 16 --merging asymmetric --turns 2

Prints a line of JSON per forward: seconds, peak memory, and the estimate that `geoaccel reconstruct` uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

import geoaccel
from geoaccel.errors import run_program
from geoaccel.eval.bench.random_weights import random_full_size
from geoaccel.eval.bench.speed import peak_memory
from geoaccel.memory import GIB, estimate_bytes
from geoaccel.merging import MERGING
from geoaccel.models import BACKBONES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=sorted(BACKBONES))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--height", type=int, default=392)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--merging", nargs="*", default=[], choices=sorted(MERGING), help="methods, after the dense model"
    )
    parser.add_argument("--turns", type=int, default=1, help="runs of each")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = random_full_size(args.backbone, args.device, dtype)
    size = (args.height, args.width)
    images = torch.rand(1, args.frames, 3, *size, generator=torch.Generator(device).manual_seed(0), device=device)
    for turn in range(args.turns):
        for method in (None, *args.merging):
            geoaccel.restore(model)
            if method is not None:
                geoaccel.accelerate(model, merging=method)
            print(json.dumps({"turn": turn, "merging": method, **row(model, images, args.backbone)}), flush=True)


@torch.inference_mode()
def row(model: Any, images: torch.Tensor, backbone: str) -> dict[str, Any]:
    """One forward."""
    device, frames, size = images.device, images.shape[1], (images.shape[-2], images.shape[-1])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with peak_memory(device) as peak:
        began, began_cpu = time.perf_counter(), time.process_time()
        predictions = model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    finite = all(value.isfinite().all() for value in predictions.values() if isinstance(value, torch.Tensor))
    merged = geoaccel.describe(model).merging
    return {
        "backbone": backbone,
        "frames": frames,
        "size": list(size),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "bypassed": merged[0].bypassed if merged else None,
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(peak[0] / GIB, 2),
        "estimated_gib": round((weights + estimate_bytes(model, frames=frames, size=size)) / GIB, 2),
        "finite": bool(finite),
    }


if __name__ == "__main__":
    sys.exit(run_program("full_size", main))
