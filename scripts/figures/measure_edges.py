"""What the edge filter removes from rendered scenes, as predicted by the small networks.

    python scripts/figures/measure_edges.py --seeds 1000-1031 --work build/edges
    python scripts/figures/measure_edges.py --seeds 8192-8223 --work build/edges --out benchmarks/edge-filter.json

A point is wrong if its depth, after one scale for the scene (the median ratio), differs from the true one by over 10 %.
Scenes have 8 frames of 224 x 224 pixels. Results are means over scenes, in percent, with 95 % intervals: wrong points
among those with known ground truth, before and after; the decrease of their fraction and of their number; what is
removed of all pixels, and of those with known ground truth (the sky has none). The rule was chosen on the validation
scenes of seeds 1000 to 1031, nothing on the report set. The work folder stores predictions: runs resume, and
measure_positions.py uses the same ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from geoaccel.edges import EDGE_FILTER, depth_edges
from geoaccel.errors import run_program
from geoaccel.eval.metrics.effects import for_json, interval
from seed_command import MODELS, kept_in, parser, predictions, provenance, seeds_of, write

OFF = 0.1


def shares(
    truth: Tensor,  # [S, H, W], 0 where there is no surface
    depth: Tensor,  # [S, H, W]
    conf: Tensor,  # [S, H, W]
    mask: Tensor,  # [S, H, W] bool
    jump: float = EDGE_FILTER,
) -> dict[str, float]:
    """For one scene: fractions of wrong points before and after, and of removed ones."""
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


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over scenes, in percent: with 95 % intervals, and the decrease of two of them."""
    means = {name: interval([100 * row[name] for row in rows]) for name in rows[0]}
    before, after, still = (means[name]["mean"] for name in ("before", "after", "still"))
    found: dict[str, Any] = {
        "off_before": means["before"],
        "off_after": means["after"],
        "off_less": interval([100 * (row["before"] - row["after"]) for row in rows]),
        "lost": means["lost"],
        "lost_of_known": means["lost_of_known"],
    }
    found = {name: for_json(of_it, 2) for name, of_it in found.items()}
    falls = {"share_falls": 1 - after / before, "number_falls": 1 - still / before}
    return found | {name: round(100 * value, 2) for name, value in falls.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models."""
    options = parser(__doc__)
    options.add_argument("--jump", type=float, default=EDGE_FILTER, help="default: %(default)s")
    args = options.parse_args(argv)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    seeds, made = seeds_of(args), provenance(*MODELS)
    work = kept_in(args, made)
    for seed in seeds:
        scene = predictions(seed, work)
        for name, of_model in rows.items():
            depth, conf, mask = (scene[f"{name}/{part}"] for part in ("depth", "conf", "mask"))
            of_model.append(shares(scene["truth/depth"], depth, conf, mask, args.jump))
    found = {name: summary(of_model) for name, of_model in rows.items()}
    print(json.dumps(found))
    write(args, __file__, made, {"jump": args.jump, "scenes": len(rows[MODELS[0]]), "percent": found})


if __name__ == "__main__":
    sys.exit(run_program("measure_edges", main))
