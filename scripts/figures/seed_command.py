"""What scripts have in common that measure rendered scenes, seed after seed, in a folder that keeps what is done."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import geoaccel
from geoaccel.atomic import write_text
from geoaccel.eval.data.synthetic import checked_seeds, sequence

MODELS = ("vggt-mini", "pi3-mini")
FRAMES, SIZE = 8, 224
OF_SCENE = ("depth", "conf", "mask", "cam_from_world")
"""What is kept of a prediction."""


def parser(about: str) -> argparse.ArgumentParser:
    """Options of every such script; its own are added."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--seeds", default="1000-1031", help="first to last (default: %(default)s)")
    found.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    found.add_argument("--out", type=Path, help="JSON to write")
    return found


def seeds_of(args: argparse.Namespace) -> Sequence[int]:
    """The seeds that were asked for, with the work folder in place.

    Raises:
        UserError: For seeds of other sets than the validation and the report set.
    """
    low, _, high = args.seeds.partition("-")
    seeds = checked_seeds(range(int(low), int(high or low) + 1), "measure on", "validation", "report")
    args.work.mkdir(parents=True, exist_ok=True)
    return seeds


def write(args: argparse.Namespace, script: str, found: Mapping[str, Any]) -> None:
    """What was found, with the command that found it, where a file is asked for."""
    if args.out is not None:
        refine = " --refine" if getattr(args, "refine", False) else ""
        command = (
            f"python scripts/figures/{Path(script).name} --seeds {args.seeds} --work FOLDER{refine} --out {args.out}"
        )
        document = {"command": command, "made": time.strftime("%Y-%m-%d"), **found}
        write_text(args.out, json.dumps(document, indent=1) + "\n")


def predictions(seed: int, work: Path) -> dict[str, Tensor]:
    """A scene as it is (``truth/depth``, ``truth/cam_from_world``) and as each model has it, kept from run to run."""
    kept = work / f"{seed}.npz"
    if not kept.exists():
        batch = sequence(seed, frames=FRAMES, size=(SIZE, SIZE))
        pictures = (batch.images[0].clamp(0, 1) * 255).round() / 255
        arrays = {"truth/depth": batch.depth[0].numpy(), "truth/cam_from_world": batch.cam_from_world[0].numpy()}
        for name in MODELS:
            scene = geoaccel.reconstruct(pictures, model=geoaccel.load_model(name))
            arrays |= {f"{name}/{part}": getattr(scene, part).numpy() for part in OF_SCENE}
        part = kept.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        part.replace(kept)
        print(f"scene {seed}", file=sys.stderr, flush=True)
    with np.load(kept) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
