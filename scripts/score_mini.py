"""Score a checkpoint on the test scenes; the figures of the model cards.

    python scripts/score_mini.py vggt-mini                       # 64 scenes, 8 frames of 224 x 224 pixels
    python scripts/score_mini.py vggt-mini --frames 32 --scenes 16
    python scripts/score_mini.py vggt-mini --frame-only          # frames cannot see each other: the instrument's zero

Prints one line of JSON with the mean of every score over scenes.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from tqdm import tqdm

from geoaccel.api import place_mixer
from geoaccel.attention import FrameOnly
from geoaccel.eval.data.synthetic import TEST_SEEDS, sequence
from geoaccel.eval.scene_scores import mean_scores, predict_scene, score_scene
from geoaccel.models.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=len(TEST_SEEDS))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frame-only", action="store_true", help="replace global attention by frame attention")
    args = parser.parse_args()
    model = load_model(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    if args.frame_only:
        place_mixer(model, FrameOnly())
    rows, seconds = [], []
    for seed in tqdm(TEST_SEEDS[: args.scenes], unit="scene"):
        scene = sequence(seed, frames=args.frames, size=(args.size, args.size), device=args.device)
        began = time.perf_counter()
        geometry = predict_scene(model, scene.images)
        seconds.append(time.perf_counter() - began)
        rows.append(score_scene(geometry, scene))
    scores = {name: round(value, 4) for name, value in mean_scores(rows).items()}
    options = {"model": args.model, "frames": args.frames, "size": args.size, "scenes": len(rows)}
    extra = {
        "dtype": args.dtype,
        "frame_only": args.frame_only,
        "latency_s": round(sorted(seconds)[len(seconds) // 2], 3),
    }
    print(json.dumps({**options, **extra, **scores}))


if __name__ == "__main__":
    main()
