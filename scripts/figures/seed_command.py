"""Common parts of scripts that measure rendered scenes seed by seed, with a folder that stores finished ones."""

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
from geoaccel.eval.run.made_by import SCORES, made_by
from geoaccel.fingerprint import of_json
from geoaccel.models.files import fingerprint

MODELS = ("vggt-mini", "pi3-mini")
FRAMES, SIZE = 8, 224
DECIDING = (*SCORES, "reconstruction", "scene")
"""Modules that affect results, besides those of networks."""
OF_SCENE = ("depth", "conf", "mask", "cam_from_world")
"""The parts of a prediction that are stored."""


def parser(about: str) -> argparse.ArgumentParser:
    """Options common to these scripts."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--seeds", default="1000-1031", help="first to last (default: %(default)s)")
    found.add_argument("--work", type=Path, required=True, help="folder for finished scenes, to resume from")
    found.add_argument("--out", type=Path, help="JSON to write")
    return found


def seeds_of(args: argparse.Namespace) -> Sequence[int]:
    """The requested seeds.

    Raises:
        UserError: For seeds outside the validation and the report set.
    """
    low, _, high = args.seeds.partition("-")
    return checked_seeds(range(int(low), int(high or low) + 1), "measure on", "validation", "report")


def provenance(*models: str) -> dict[str, Any]:
    """What affects results besides the seed: code, machine and versions, and the weights of models."""
    return {"made_by": made_by("cpu", DECIDING), "weights": {name: fingerprint(name) for name in models}}


def kept_in(args: argparse.Namespace, made: Mapping[str, Any]) -> Path:
    """A folder in the work folder only for results of this provenance, so that no run reuses others' results."""
    folder = Path(args.work) / of_json(made)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(args: argparse.Namespace, script: str, made: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write the results, with the command and the provenance, if an output file is given."""
    if args.out is None:
        return
    own = {name: value for name, value in vars(args).items() if name not in ("seeds", "work", "out")}
    given = [f"--{name}" if value is True else f"--{name} {value}" for name, value in own.items() if value is not False]
    words = ["python", f"scripts/figures/{Path(script).name}", f"--seeds {args.seeds}", "--work FOLDER", *given]
    command = " ".join([*words, f"--out {args.out}"])
    document = {"command": command, "made": time.strftime("%Y-%m-%d"), **made, **found}
    write_text(args.out, json.dumps(document, indent=1) + "\n")


def predictions(seed: int, work: Path) -> dict[str, Tensor]:
    """Ground truth (``truth/depth``, ``truth/cam_from_world``) and every model's prediction of a scene, cached."""
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
