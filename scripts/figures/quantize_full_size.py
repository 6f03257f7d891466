"""Quantize a backbone at its published size with random weights: time, memory, and size of the file.

    python scripts/figures/quantize_full_size.py vggt --quantization w4a16 --folder full-size

Makes a float32 checkpoint, exports it and loads the result, each in a separate process so that peaks do not mix, and
deletes both files. Prints one line of JSON. Peaks are of resident memory: pages of a mapped file count while they are
in memory, although the system could reclaim them. ``load_peak_over_file`` excludes the memory used before loading
(Python and torch).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import run_program
from geoaccel.eval.bench.random_weights import random_full_size
from geoaccel.models import BACKBONES
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization import QUANTIZATION
from geoaccel.quantized_file import export_quantized


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_source(backbone: str, path: Path) -> None:
    """A checkpoint with random weights."""
    save_model(random_full_size(backbone, "cpu", torch.float32), path, dtype=torch.float32)


def export(source: Path, quantization: str, out: Path) -> dict[str, Any]:
    """Quantize the file."""
    before = peak_bytes()
    began = time.perf_counter()
    written = export_quantized(str(source), [QUANTIZATION[quantization]()], out)
    seconds = time.perf_counter() - began
    rest = written.numbers - sum(part.weights for part in written.parts)
    arithmetic = sum(part.stored_bytes for part in written.parts) + 2 * rest
    return {
        "linears": sum(part.linears for part in written.parts),
        "quantized_weights": sum(part.weights for part in written.parts),
        "source_gb": round(source.stat().st_size / 1e9, 3),
        "file_gb": round(written.file_bytes / 1e9, 4),
        "arithmetic_gb": round(arithmetic / 1e9, 4),
        "below_bfloat16": round(2 * written.numbers / written.file_bytes, 2),
        "below_float32": round(4 * written.numbers / written.file_bytes, 2),
        "export_seconds": round(seconds, 1),
        "export_peak_gb": round(peak_bytes() / 1e9, 2),
        "process_before_gb": round(before / 1e9, 2),
    }


def load(path: Path) -> dict[str, Any]:
    """Load the result as a user would."""
    before = peak_bytes()
    began = time.perf_counter()
    model = load_model(path)
    seconds = time.perf_counter() - began
    loaded = peak_bytes()
    # A checkpoint is read on first use: touch every page of it.
    for tensor in model.state_dict().values():
        tensor.view(-1).view(torch.uint8)[::4096].sum() if tensor.ndim else None
    size = path.stat().st_size
    return {
        "load_seconds": round(seconds, 2),
        "load_peak_over_file": round((loaded - before) / size, 2),
        "load_and_read_peak_over_file": round((peak_bytes() - before) / size, 2),
        "load_process_peak_gb": round(loaded / 1e9, 2),
    }


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=sorted(BACKBONES))
    parser.add_argument("--quantization", default="w4a16", choices=sorted(QUANTIZATION))
    parser.add_argument("--folder", required=True, help="for temporary files (6 GB)")
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, out = folder / "source.safetensors", folder / "quantized.safetensors"
    try:
        apart(make_source, args.backbone, source)
        row = {"backbone": args.backbone, "quantization": args.quantization, "threads": torch.get_num_threads()}
        row |= apart(export, source, args.quantization, out)
        row |= apart(load, out)
    finally:
        for path in (source, out):
            path.unlink(missing_ok=True)
    print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(run_program("quantize_full_size", main))
