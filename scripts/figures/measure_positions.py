"""How well known positions fit the cameras that the small networks predict of rendered scenes.

    python scripts/figures/measure_positions.py --seeds 1000-1031 --work build/positions
    python scripts/figures/measure_positions.py --seeds 8192-8223 --work build/positions --out benchmarks/positions.json

Scenes have 8 frames of 224 x 224 pixels. Lengths are shares of the extent: the largest distance of a true camera from
their mean. Figures are medians over scenes, in percent, with the 90th percentile:

    apart          mean distance of the moved cameras from the true ones, after the best of all similarities
    moved, scale   how far the moved cameras lie from there, and by how much the scale differs: with true positions, and
                   with two of the eight wrong by the extent (far), or by 0.3 of it (near), in random directions
    named          share of these two that are named as wrong (a mean)
    one_distance   by how much the scale of the true distance of the two cameras farthest apart differs from the best

The rule was chosen by the validation scenes of seeds 1000 to 1031. The work folder keeps predictions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoaccel.alignment import robust_similarity, umeyama
from geoaccel.cameras import invert_rigid
from geoaccel.errors import run_program
from seed_command import MODELS, parser, predictions, seeds_of, write

WRONG = 2


def cameras(seed: int, work: Path) -> dict[str, Tensor]:
    """Centres of the true cameras and of those that each model predicts [S, 3]."""
    scene = predictions(seed, work)
    poses = {name: scene[f"{name}/cam_from_world"].double() for name in ("truth", *MODELS)}
    return {name: invert_rigid(of_name)[:, :3, 3] for name, of_name in poses.items()}


def score(predicted: Tensor, truth: Tensor, seed: int) -> dict[str, float]:
    """Figures of one scene, as shares."""
    extent = float((truth - truth.mean(0)).norm(dim=-1).max())
    best = umeyama(predicted, truth)
    right = best.apply_points(predicted)
    apart = torch.cdist(predicted, predicted)
    first, second = divmod(int(apart.argmax()), len(predicted))
    distance = float((truth[first] - truth[second]).norm() / apart[first, second])
    row = {
        "apart": float((right - truth).norm(dim=-1).mean()) / extent,
        "one_distance": abs(distance / float(best.scale) - 1),
    }
    for name, size in (("true", 0.0), ("far", 1.0), ("near", 0.3)):
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(len(truth), generator=generator)[:WRONG]
        given = truth.clone()
        off = torch.nn.functional.normalize(torch.randn(WRONG, 3, generator=generator, dtype=torch.float64), dim=-1)
        given[wrong] += size * extent * off
        fit = robust_similarity(predicted, given)
        moved = fit.similarity.apply_points(predicted)
        row[f"{name}/moved"] = float((moved - right).norm(dim=-1).mean()) / extent
        row[f"{name}/scale"] = abs(float(fit.similarity.scale / best.scale) - 1)
        row[f"{name}/named"] = float((~fit.agrees[wrong]).double().mean())
    return row


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Median and 90th percentile over scenes, in percent; means of what is named."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = 100 * np.array([row[name] for row in rows])
        parts = np.percentile(values, (50, 90)).round(2).tolist()
        found[name] = round(float(values.mean()), 1) if name.endswith("named") else parts
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models."""
    args = parser(__doc__).parse_args(argv)
    scenes = {seed: cameras(seed, args.work) for seed in seeds_of(args)}
    found = {
        name: summary([score(scene[name], scene["truth"], seed) for seed, scene in scenes.items()]) for name in MODELS
    }
    print(json.dumps(found))
    write(args, __file__, {"scenes": len(scenes), "percent": found})


if __name__ == "__main__":
    sys.exit(run_program("measure_positions", main))
