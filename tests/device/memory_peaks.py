"""Peak memory of VGGT-1B with every method, on a simulated device: the table of docs/memory.md.

    GEOACCEL_RATES=built-in python tests/device/memory_peaks.py benchmarks/memory-simulated-vggt.json

bfloat16, frames of 392 x 518, cameras and depth: everything at once, and with the plan that is chosen for a limit. As
blocks are alike, a few of the published width stand for all, and the weights of all are added. Rows that are in the
file already are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from full_size import FEW_BLOCKS, SIZE, FullSize, full_size
from geoaccel.memory import CUDA_CONTEXT, HEADROOM, Limit, choose, read_size
from geoaccel.memory_plan import MemoryPlan
from geoaccel.merging import AVGGT, HTTM, Asymmetric, CoMe, FastVGGT, LiteVGGT
from geoaccel.merging.alike import Alike
from geoaccel.models import build
from geoaccel.precision import cast

GIB = 2**30
METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "litevggt": LiteVGGT,
    "fastvggt": FastVGGT,
    "httm": HTTM,
    "asymmetric": Asymmetric,
    "avggt": AVGGT,
    # Which keys weigh the same only numbers tell: without weights here.
    "come": lambda: CoMe(predictor="untrained", log_bias=False),
    "alike": lambda: Alike(log_bias=False),
}
HEADS = ("camera", "depth")
RUNS = (("12GB", 300), (None, 100), ("24GB", 1000), (None, 300), (None, 1000))


@cache
def all_weights(backbone: str) -> int:
    """Bytes of the published network."""
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in cast(build(backbone), torch.bfloat16).parameters())


def plan_for(limit: str | None, backbone: str, frames: int, heads: tuple[str, ...]) -> Callable[[Any], Any]:
    """What is chosen where so much of a device is to be used."""

    def plan(model: Any) -> MemoryPlan | None:
        if limit is None:
            return None
        room = int((read_size(limit) - CUDA_CONTEXT - all_weights(backbone)) / HEADROOM)
        choice = choose(model, frames, SIZE, Limit(heads=heads), room)
        assert choice.fits, f"{frames} frames do not fit into {limit}"
        return choice.plan

    return plan


def measured(method: str, frames: int, limit: str | None) -> dict[str, Any]:
    """One row."""
    chosen: list[Any] = []

    def plan(model: Any) -> MemoryPlan | None:
        chosen.append(plan_for(limit, "vggt", frames, HEADS)(model))
        return chosen[0]

    found = full_size("vggt", METHODS[method](), frames, plan=plan, config=FEW_BLOCKS["vggt"], heads=HEADS)
    return {
        "method": method,
        "frames": frames,
        "max_memory": limit,
        "plan": None if chosen[0] is None else str(chosen[0]),
        "peak_gib": round(of_all(found, "vggt") / GIB, 3),
        "predicted_gib": round((found.estimate + all_weights("vggt")) / GIB, 3),
        "weights_gib": round(all_weights("vggt") / GIB, 3),
    }


def of_all(found: FullSize, backbone: str) -> int:
    """The peak with the weights of all blocks."""
    return found.peak - found.weights + all_weights(backbone)


def main() -> None:
    """Run what is missing; each row is written at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON of the rows")
    path: Path = parser.parse_args().path
    rows = json.loads(path.read_text()) if path.exists() else []
    there = {(row["method"], row["frames"], row["max_memory"]) for row in rows}
    for limit, frames in RUNS:
        for method in METHODS:
            if (method, frames, limit) not in there:
                rows.append(measured(method, frames, limit))
                print(json.dumps(rows[-1]), flush=True)
                path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
