"""The predicted tables of docs/scaling.md: one scene on several GPUs.

    python scripts/figures/scaling.py            # prints them
    python scripts/figures/scaling.py --write    # and puts them into the document

Other machines: --linear-flops 8e14 --between 1e11 and so on, the fields of :class:`geoaccel.sharding.predict.Cluster`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import run_program
from geoaccel.merging import Asymmetric
from geoaccel.models import build
from geoaccel.sharding.predict import Cluster, Prediction, predict

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables of scripts/figures/scaling.py -->\n", "<!-- end of tables -->"
FRAMES, GPUS = (1_000, 3_000, 10_000, 30_000, 100_000), (1, 2, 4, 8, 16, 32, 64)
SIZE = (392, 518)
CHOICES = (("dense", None), ("asymmetric", Asymmetric()))


def tables(cluster: Cluster) -> str:
    """All of them as Markdown."""
    with torch.device("meta"):
        network: Any = build("vggt", heads=("camera", "depth"))
    found = {
        (name, frames, gpus): predict(network, frames, SIZE, gpus, cluster, merging)
        for name, merging in CHOICES
        for frames in FRAMES
        for gpus in GPUS
    }
    lines = [f"VGGT-1B, camera and depth head, {SIZE[0]} x {SIZE[1]} pixels. Assumed GPU and links:", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| `{name}` | {value:g} |" for name, value in asdict(cluster).items()]
    for name, _ in CHOICES:
        lines += ["", f"Time of a forward, {name}; brackets mark what does not fit into the memory of a GPU:", ""]
        lines += table([(frames, [cell(found[name, frames, gpus]) for gpus in GPUS]) for frames in FRAMES])
    lines += ["", "Data received per GPU and layer, and share of the time spent waiting for it, on 64 GPUs:", ""]
    lines += list(traffic(found))
    return "\n".join(lines) + "\n"


def table(rows: list[tuple[int, list[str]]]) -> Iterator[str]:
    """One row per number of frames."""
    yield "| frames | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS) + " |"
    yield "|---:|" + "---:|" * len(GPUS)
    for frames, cells in rows:
        yield f"| {frames:,} | " + " | ".join(cells) + " |"


def traffic(found: dict[tuple[str, int, int], Prediction]) -> Iterator[str]:
    """Bytes per layer of both."""
    yield "| frames | dense | asymmetric | of dense | dense waits | asymmetric waits |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for frames in FRAMES:
        dense, few = (found[name, frames, GPUS[-1]] for name, _ in CHOICES)
        waits = " | ".join(f"{100 * one.waiting / one.seconds:.0f} %" for one in (dense, few))
        yield (
            f"| {frames:,} | {dense.layer_bytes / 1e9:.3g} GB | {few.layer_bytes / 1e9:.3g} GB | "
            f"1/{dense.layer_bytes / few.layer_bytes:.3g} | {waits} |"
        )


def cell(prediction: Prediction) -> str:
    """A readable time."""
    text = duration(prediction.seconds)
    return text if prediction.fits else f"({text})"


def duration(seconds: float) -> str:
    """Two or three digits in a suitable unit."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if seconds / unit < 10 else 0}f} {name}"
    return f"{seconds / 86400:.0f} days"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    for field in fields(Cluster):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = vars(parser.parse_args())
    write = args.pop("write")
    text = tables(Cluster(**args))
    print(text, end="")
    if write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.exit(run_program("scaling", main))
