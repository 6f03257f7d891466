"""The results of docs/long-sequences.md: paths with exact ground truth in windows, and windows against one forward.

    python scripts/figures/long_sequences.py path vggt-mini --seed 1000 --path loop --window 32 --out build/long.jsonl
    python scripts/figures/long_sequences.py against vggt-mini --seed 1000 --frames 128 --window 32 60 --out a.jsonl

Each appends a line of JSON per window length to a file and prints it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
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
    """The path, reconstructed; its files are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        return geoaccel.reconstruct_windows(
            images, model=model, out=Path(folder) / "out", window=window, overlap=overlap, size=PIXELS, formats=None
        )


def measure_path(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A whole path in windows of each length, scored as by ``geoaccel eval data=long_paths``."""
    for window in args.window:
        settings = [
            *("data=long_paths", f"data.options.path={args.path}", f"data.options.seeds=[{args.seed}]"),
            *(f"data.frames={args.frames}", f"data.options.size=[{PIXELS},{PIXELS}]", f"model={args.model}"),
            *(f"windows={window}", f"joining.overlap={'null' if args.overlap is None else args.overlap}"),
            "timing.repeats=0",
        ]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan.from_settings(compose_settings("eval", [*settings, f"out={folder}/run"]))
            (scene,) = score(plan, predict(plan)).scenes
        assert scene.details is not None
        seconds = time.perf_counter() - began
        yield {"window": window, "seconds": seconds, **scene.values, "sequence": scene.details.about}


def measure_against(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Relative poses of windows of each length against those of one forward, and the effect of the order of frames.

    The first order is that of the path; in every order the first frame is the reference view.
    """
    path = long_path(args.seed, args.path, frames=args.frames, size=(PIXELS, PIXELS))
    images, model = video_of(path), geoaccel.load_model(args.model)
    draws = torch.Generator().manual_seed(args.seed)
    orders = [torch.arange(len(images)), *(torch.randperm(len(images), generator=draws) for _ in range(args.orders))]
    dense = [geoaccel.reconstruct(images[order], model=model).cam_from_world[order.argsort()] for order in orders]
    truth = path.cameras.cam_from_world[0]
    of_dense = {
        "between orders": difference(itertools.combinations(dense, 2)),
        "dense to truth": difference([(dense[0], truth)]),
        "dense in any order to truth": difference((one, truth) for one in dense),
    }
    for window in args.window:
        pieces = in_windows(path, images, model, window, args.overlap).pieces
        found = {"window": window, "pieces": len(pieces), **of_dense}
        if len(pieces) == 1:  # frames of two pieces have no relative pose
            poses = pieces[0].cam_from_world.float()
            found |= {
                "windows": difference((poses, one) for one in dense),
                "windows to the first order": difference([(poses, dense[0])]),
                "windows to truth": difference([(poses, truth)]),
            }
        yield found


def difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Differences of relative poses in degrees: medians over all pairs of frames of all pairs of reconstructions.

    Args:
        pairs: cam_from_world [S, 4, 4] twice.

    Returns:
        For rotation and direction angles, and the larger of both (``pose_deg``), for which the smallest and the largest
        median of one pair of reconstructions are also given.
    """
    errors = [relative_pose_errors(*pair) for pair in pairs]
    larger = [torch.maximum(*both) for both in errors]
    medians = [float(one.median()) for one in larger]
    rotation, translation = (torch.cat(column) for column in zip(*errors, strict=True))
    return {
        "rotation_deg": float(rotation.median()),
        "translation_deg": float(translation.median()),
        "pose_deg": float(torch.cat(larger).median()),
        "least_pose_deg": min(medians),
        "most_pose_deg": max(medians),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("path", "against"))
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--path", default="loop", choices=("loop", "two-loops", "corridor"))
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--window", type=int, nargs="+", default=[32])
    parser.add_argument("--overlap", type=int)
    parser.add_argument("--orders", type=int, default=5, help="random orders of one forward, besides that of the path")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Measure, and add a line to the file for each length of windows."""
    checked_seeds([args.seed], "measure long sequences on", "validation", "report")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for found in measure_path(args) if args.what == "path" else measure_against(args):
        line = json.dumps({**settings, **found})
        with args.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    args = arguments()
    sys.exit(run_program("long_sequences", lambda: work(args)))


if __name__ == "__main__":
    main()
