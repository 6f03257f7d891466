"""Run a backbone at its published size with random weights: does it fit, how long does it take, is the estimate right?

    python scripts/figures/full_size.py vggt --frames 8 --height 392 --width 518 --dtype bfloat16

Prints one line of JSON: seconds of one forward, peak memory, and the estimate that `geoaccel reconstruct` goes by.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from geoaccel.errors import run_program
from geoaccel.eval.bench.random_weights import random_full_size
from geoaccel.eval.bench.speed import peak_memory
from geoaccel.memory import GIB, estimate_bytes
from geoaccel.models import BACKBONES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=sorted(BACKBONES))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--height", type=int, default=392)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = random_full_size(args.backbone, args.device, dtype)
    size = (args.height, args.width)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    estimate = estimate_bytes(model, frames=args.frames, size=size)
    images = torch.rand(1, args.frames, 3, *size, generator=torch.Generator(device).manual_seed(0), device=device)
    with torch.inference_mode(), peak_memory(device) as peak:
        began = time.perf_counter()
        predictions = model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    finite = all(value.isfinite().all() for value in predictions.values() if isinstance(value, torch.Tensor))
    row = {
        "backbone": args.backbone,
        "frames": args.frames,
        "size": list(size),
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(peak[0] / GIB, 2),
        "estimated_gib": round((weights + estimate) / GIB, 2),
        "finite": bool(finite),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(run_program("full_size", main))
