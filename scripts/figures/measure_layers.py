"""Effect of the global layers of a network: each replaced by frame attention, and methods over all of them.

    python scripts/figures/measure_layers.py vggt-mini runs/vggt-mini-deep/model.safetensors --out layers.json

Validation scenes of 16 frames of 224 x 224 pixels, bypassing off. For every model: the dense one, each layer alone with
frame attention in place of global attention, and each method; means over scenes, with 95 % intervals, of AUC@30, AUC@5,
AbsRel and the median distance of poses from the dense model's in degrees. Each row is written at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import geoaccel
from geoaccel.atomic import write_text
from geoaccel.backbone import Geometry
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import SceneBatch, checked_seeds, sequence
from geoaccel.eval.metrics.depth import depth_errors
from geoaccel.eval.metrics.effects import for_json, interval
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.merging import AVGGT, HTTM, Asymmetric, FastVGGT, LiteVGGT

FRAMES, SIZE = 16, 224
METHODS: dict[str, Any] = {
    "httm": HTTM(bypass=False),
    "litevggt": LiteVGGT(bypass=False),
    "fastvggt": FastVGGT(bypass=False),
    "avggt": AVGGT(bypass=False),
    "asymmetric": Asymmetric(bypass=False),
}


def variants(depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and keywords of ``accelerate``; the dense model first."""
    yield "dense", {}
    for layer in range(depth):
        yield f"layer {layer}", {"layers": {layer: "frame-only"}}
    for name, method in METHODS.items():
        yield name, {"merging": method}


@torch.inference_mode()
def predict(model: Any, images: Tensor) -> Geometry:  # images [1, S, 3, H, W]
    return model.backbone.geometry(model(images), tuple(images.shape[-2:]))


def score(found: Geometry, dense: Geometry, truth: SceneBatch) -> list[float]:
    """AUC@30, AUC@5, AbsRel and degrees to the dense model of one scene."""
    errors = torch.maximum(*relative_pose_errors(found.cam_from_world[0], truth.cam_from_world[0]))
    moved = torch.maximum(*relative_pose_errors(found.cam_from_world[0], dense.cam_from_world[0]))
    depth = depth_errors(found.depth[0], truth.depth[0], mask=truth.valid[0])["abs_rel"]
    return [auc(errors, 30), auc(errors, 5), depth, float(moved.median())]


def measure(name: str, model: Any, scenes: list[SceneBatch]) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    dense = [predict(model, scene.images) for scene in scenes]
    for what, given in tqdm(list(variants(model.config.depth)), desc=name):
        if given:
            geoaccel.accelerate(model, **given)
        found = [predict(model, scene.images) for scene in scenes]
        geoaccel.restore(model)
        rows = [score(*of_scene) for of_scene in zip(found, dense, scenes, strict=True)]
        names = ("auc_30", "auc_5", "depth_abs_rel", "to_dense_deg")
        columns = zip(names, map(interval, zip(*rows, strict=True)), strict=True)
        scores = {name: for_json(found, 4) for name, found in columns}
        yield {"layers": model.config.depth, "what": what, **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or paths of VGGT checkpoints")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.exit(run_program("measure_layers", lambda: work(args)))


def work(args: argparse.Namespace) -> None:
    seeds = checked_seeds(range(1000, 1000 + args.scenes), "measure layers on", "validation")
    models = {Path(name).parent.name or name: geoaccel.load_model(name) for name in args.models}
    scenes = [sequence(seed, frames=FRAMES, size=(SIZE, SIZE)) for seed in seeds]
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        for row in measure(name, model, scenes):
            rows.append({"model": name, **row})
            document = {"made": time.strftime("%Y-%m-%d"), "frames": FRAMES, "scenes": len(scenes), "rows": rows}
            write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
