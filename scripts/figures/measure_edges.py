"""What the edge filter leaves out of rendered scenes, as the small networks predict them.

    python scripts/figures/measure_edges.py --seeds 1000-1031 --work build/edges
    python scripts/figures/measure_edges.py --seeds 8192-8223 --work build/edges --out benchmarks/edge-filter.json

A point is off if its depth, after one scale for the scene (the median ratio), differs from the true one by over 10 %.
Scenes have 8 frames of 224 x 224 pixels. Figures are means over scenes, in percent: points that are off, of those whose
true place is known, before and after; by how much their share and their number fall; what is left out of all pixels,
and of those whose true place is known (the sky has none). The rule was chosen by the validation scenes of seeds 1000
to 1031; by the report set nothing was. The work folder keeps predictions: a run goes on where another ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import geoaccel
from geoaccel.atomic import write_text
from geoaccel.edges import EDGE_FILTER, depth_edges
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import checked_seeds, sequence

MODELS = ("vggt-mini", "pi3-mini")
FRAMES, SIZE, OFF = 8, 224, 0.1


def predictions(seed: int, work: Path) -> dict[str, Tensor]:
    """True depth, and depth, confidence and mask of each model, from an earlier run where there is one."""
    kept = work / f"{seed}.npz"
    if not kept.exists():
        batch = sequence(seed, frames=FRAMES, size=(SIZE, SIZE))
        pictures = (batch.images[0].clamp(0, 1) * 255).round() / 255
        arrays = {"truth": batch.depth[0].numpy()}
        for name in MODELS:
            scene = geoaccel.reconstruct(pictures, model=geoaccel.load_model(name))
            found = {"depth": scene.depth, "conf": scene.conf, "mask": scene.mask}
            arrays |= {f"{name}/{part}": value.numpy() for part, value in found.items()}
        with open(kept, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        print(f"scene {seed}", file=sys.stderr, flush=True)
    with np.load(kept) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def shares(
    truth: Tensor,  # [S, H, W], 0 where there is no surface
    depth: Tensor,  # [S, H, W]
    conf: Tensor,  # [S, H, W]
    mask: Tensor,  # [S, H, W] bool
    jump: float = EDGE_FILTER,
) -> dict[str, float]:
    """Of one scene: points that are off before and after, as shares, and what is left out."""
    known = mask & (truth > 0)
    scale = (truth[known] / depth[known]).median()
    off = known & ((scale * depth / truth.clamp(min=1e-9) - 1).abs() > OFF)
    edges = depth_edges(depth, mask, jump, conf)
    kept = known & ~edges
    return {
        "before": float(off.sum() / known.sum()),
        "after": float((off & kept).sum() / kept.sum()),
        "still": float((off & kept).sum() / known.sum()),
        "lost": float(edges.sum() / mask.sum()),
        "lost_of_known": float((edges & known).sum() / known.sum()),
    }


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over scenes, in percent, and by how much the share and the number of points that are off fall."""
    before, after, still, lost, of_known = (float(np.mean([row[name] for row in rows])) for name in rows[0])
    figures = {
        "off_before": before,
        "off_after": after,
        "share_falls": 1 - after / before,
        "number_falls": 1 - still / before,
        "lost": lost,
        "lost_of_known": of_known,
    }
    return {name: round(100 * value, 2) for name, value in figures.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1000-1031")
    parser.add_argument("--jump", type=float, default=EDGE_FILTER)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    low, _, high = args.seeds.partition("-")
    seeds = checked_seeds(range(int(low), int(high or low) + 1), "measure on", "validation", "report")
    args.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in seeds:
        scene = predictions(seed, args.work)
        for name, of_model in rows.items():
            depth, conf, mask = (scene[f"{name}/{part}"] for part in ("depth", "conf", "mask"))
            of_model.append(shares(scene["truth"], depth, conf, mask, args.jump))
    found: dict[str, Any] = {name: summary(of_model) for name, of_model in rows.items()}
    print(json.dumps(found))
    if args.out is not None:
        command = f"python scripts/figures/measure_edges.py --seeds {args.seeds} --work FOLDER --out {args.out}"
        document = {"command": command, "made": time.strftime("%Y-%m-%d"), "jump": args.jump, "percent": found}
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_program("measure_edges", main))
