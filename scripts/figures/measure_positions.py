"""How well known positions fit the cameras that the small networks predict for rendered scenes.

    python scripts/figures/measure_positions.py --seeds 1000-1031 --work build/positions
    python scripts/figures/measure_positions.py --seeds 8192-8223 --work build/positions --out benchmarks/positions.json
    python scripts/figures/measure_positions.py --seeds 8192-8223 --work build/positions --refine

Scenes have 8 frames of 224 x 224 pixels. With --refine photographs have 448 x 448, which the network sees at 224 x 224,
and cameras are refined on them (`reconstruct --refine ba`). Lengths are relative to the extent: the largest distance of
a true camera from their mean. Results are medians over scenes, in percent, with the 90th percentile:

    apart          mean distance of the aligned cameras from the true ones, after the best similarity
    moved, scale   distance of the aligned cameras from that, and difference in scale: with true positions, and with two
                   of the eight wrong by the extent (far), or by 0.3 of it (near), in random directions
    named          fraction of these two that are reported as wrong (a mean)
    auc_5          of poses (a mean, not in percent, with its 95 % interval)
    one_distance   difference from the best scale if scaled by the true distance of the two cameras farthest apart

The rule was chosen on the validation scenes of seeds 1000 to 1031. The work folder stores predictions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import geoaccel
from geoaccel.alignment import robust_similarity, umeyama
from geoaccel.atomic import atomic_file
from geoaccel.cameras import invert_rigid
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import sequence
from geoaccel.eval.metrics.effects import for_json, interval
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.eval.tools.demo import write_photographs
from seed_command import FRAMES, MODELS, SIZE, kept_in, parser, predictions, provenance, seeds_of, write

WRONG = 2


def cameras(seed: int, work: Path, *, refine: bool) -> dict[str, Tensor]:
    """True cameras and those predicted by each model [S, 4, 4]."""
    scene = (refined if refine else predictions)(seed, work)
    return {name: scene[f"{name}/cam_from_world"].double() for name in ("truth", *MODELS)}


def refined(seed: int, work: Path) -> dict[str, Tensor]:
    """True cameras, and predicted ones after bundle adjustment to photographs larger than the network's input."""
    kept = work / f"{seed}-refined.npz"
    if not kept.exists():
        batch = sequence(seed, frames=FRAMES, size=(2 * SIZE, 2 * SIZE))
        poses = {"truth/cam_from_world": batch.cam_from_world[0].numpy()}
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(batch, Path(folder) / "photos")
            for name in MODELS:
                options: dict[str, Any] = {"model": geoaccel.load_model(name), "size": SIZE, "refine": "ba"}
                poses[f"{name}/cam_from_world"] = geoaccel.reconstruct(
                    Path(folder) / "photos", **options
                ).cam_from_world.numpy()
        with atomic_file(kept) as part, open(part, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **poses)
        print(f"scene {seed}", file=sys.stderr, flush=True)
    with np.load(kept) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def score_poses(predicted: Tensor, truth: Tensor, seed: int) -> dict[str, float]:
    """Results for one scene's poses [S, 4, 4], as fractions."""
    rotation, translation = relative_pose_errors(predicted.float(), truth.float())
    own, true = (invert_rigid(poses)[:, :3, 3] for poses in (predicted, truth))
    return score(own, true, seed) | {"auc_5": auc(torch.maximum(rotation, translation), 5)}


def score(predicted: Tensor, truth: Tensor, seed: int) -> dict[str, float]:
    """Results for one scene's camera centres [S, 3], as fractions."""
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
    """Median and 90th percentile over scenes, in percent; means of ``named``, and of AUC@5 with its interval."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = 100 * np.array([row[name] for row in rows])
        parts = np.percentile(values, (50, 90)).round(2).tolist()
        found[name] = round(float(values.mean()), 1) if name.endswith("named") else parts
    poses = interval([row["auc_5"] for row in rows])
    return found | {"auc_5": for_json(poses, 3)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models."""
    options = parser(__doc__)
    options.add_argument("--refine", action="store_true", help="refine cameras on larger photographs first")
    args = options.parse_args(argv)
    seeds, made = seeds_of(args), provenance(*MODELS)
    work = kept_in(args, made)
    scenes = {seed: cameras(seed, work, refine=args.refine) for seed in seeds}
    found = {
        name: summary([score_poses(scene[name], scene["truth"], seed) for seed, scene in scenes.items()])
        for name in MODELS
    }
    print(json.dumps(found))
    write(args, __file__, made, {"scenes": len(scenes), "refine": args.refine, "percent": found})


if __name__ == "__main__":
    sys.exit(run_program("measure_positions", main))
