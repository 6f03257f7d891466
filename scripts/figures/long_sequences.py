"""The figures of docs/long-sequences.md: paths with exact truth in windows, and windows against one forward.

    python scripts/figures/long_sequences.py path vggt-mini --seed 1000 --path loop --window 32 --out build/long.jsonl
    python scripts/figures/long_sequences.py against vggt-mini --seed 1000 --frames 128 --out build/long.jsonl

Each adds a line of JSON to a file and prints it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import geoaccel
from geoaccel.errors import run_program
from geoaccel.eval.data.long_paths import LongPath, long_path
from geoaccel.eval.data.synthetic import checked_seeds
from geoaccel.eval.metrics.pose import relative_pose_errors
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import predict, score
from geoaccel.eval.run.settings import compose_settings

PIXELS = 112
AT_ONCE = 32


def video_of(path: LongPath) -> Tensor:  # [S, 3, H, W]
    """All frames of a path."""
    starts = range(0, len(path), AT_ONCE)
    return torch.cat([path.render(start, min(start + AT_ONCE, len(path))).images[0] for start in starts])


def in_windows(path: LongPath, images: Tensor, model: Any, window: int, overlap: int | None) -> Any:
    """The path, reconstructed; its files are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        return geoaccel.reconstruct_windows(
            images, model=model, out=Path(folder) / "out", window=window, overlap=overlap, size=PIXELS, formats=None
        )


def measure_path(args: argparse.Namespace) -> dict[str, Any]:
    """A whole path in windows, as ``geoaccel eval data=long_paths`` scores it."""
    settings = [
        *("data=long_paths", f"data.options.path={args.path}", f"data.options.seeds=[{args.seed}]"),
        *(f"data.frames={args.frames}", f"data.options.size=[{PIXELS},{PIXELS}]", f"model={args.model}"),
        *(f"windows={args.window}", f"joining.overlap={'null' if args.overlap is None else args.overlap}"),
        "timing.repeats=0",
    ]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.from_settings(compose_settings("eval", [*settings, f"out={folder}/run"]))
        (scene,) = score(plan, predict(plan)).scenes
    assert scene.details is not None
    return {"seconds": time.perf_counter() - began, **scene.values, "sequence": scene.details.about}


def measure_against(args: argparse.Namespace) -> dict[str, Any]:
    """Relative poses of windows, and of a dense forward in another order, against those of one dense forward."""
    path = long_path(args.seed, args.path, frames=args.frames, size=(PIXELS, PIXELS))
    images, model = video_of(path), geoaccel.load_model(args.model)
    dense = geoaccel.reconstruct(images, model=model).cam_from_world
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    shuffled = geoaccel.reconstruct(images[order], model=model).cam_from_world[order.argsort()]
    (piece,) = in_windows(path, images, model, args.window, args.overlap).pieces
    truth = path.cameras.cam_from_world[0]
    found: dict[str, Any] = {}
    for name, poses, other in (
        ("shuffled", shuffled, dense),
        ("windows", piece.cam_from_world.float(), dense),
        ("dense to truth", dense, truth),
        ("windows to truth", piece.cam_from_world.float(), truth),
    ):
        rotation, translation = relative_pose_errors(poses, other)
        found[name] = {
            "rotation_deg": float(rotation.median()),
            "translation_deg": float(translation.median()),
            "pose_deg": float(torch.maximum(rotation, translation).median()),
        }
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("path", "against"))
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--path", default="loop", choices=("loop", "two-loops", "corridor"))
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--overlap", type=int)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Measure, and add a line to the file."""
    checked_seeds([args.seed], "measure long sequences on", "validation", "report")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    line = json.dumps({**settings, **(measure_path(args) if args.what == "path" else measure_against(args))})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(line + "\n")
    print(line)


def main() -> None:
    args = arguments()
    sys.exit(run_program("long_sequences", lambda: work(args)))


if __name__ == "__main__":
    main()
