"""What options may be called by name, each in half a line. Tests hold these tables to the registries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from geoaccel.registry import unknown

MERGING = {
    "asymmetric": "ours: queries see a fixed subset of the keys; the smallest loss",
    "alike": "ours: merges patches that look alike, from the encoder on",
    "httm": "every head merges queries and keys among nearby frames",
    "fastvggt": "merges into random patches, anywhere in the scene",
    "litevggt": "keeps edges, merges into flat patches, reuses the matching",
    "come": "merges where confidence will be low; needs a predictor",
    "avggt": "early layers see one frame, the others a grid of keys",
}
QUANTIZATION = {"fp8": "8-bit floats, weights and activations", "w4a16": "4-bit weights: the smallest"}
ATTENTION = {
    "sdpa": "torch's fused kernels (default)",
    "xformers": "memory-efficient attention; extra cuda",
    "matmul": "the plain formula, for comparison",
    "fp8": "8-bit floats; fast on recent GPUs alone",
}
DTYPES = {
    "auto": "what geoaccel info names (default)",
    "float32": "exact",
    "bfloat16": "half the memory",
    "float16": "half the memory, on GPUs without bfloat16",
}
USUAL_FORMATS = "ply,glb,colmap,png,view"
"""Where none are named."""
WINDOW_FORMATS = "ply,glb,colmap,tum"
"""The same for a sequence in windows: png and view need all images at once."""
FORMATS = {
    "ply": "coloured points",
    "glb": "points and cameras for any viewer",
    "colmap": "scene folder for 3DGS, gsplat, COLMAP",
    "colmap-text": "the same, as text",
    "nerfstudio": "transforms.json",
    "png": "contact sheet",
    "view": "for geoaccel view, with confidence and edges",
    "npz": "every array",
    "depth": "maps of 16 bits",
    "depth-exr": "maps of floats; extra exr",
    "confidence": "maps of 8 bits",
    "mesh": "surface; extra mesh",
    "tum": "trajectory",
    "kitti": "trajectory",
}
MODES = {
    "crop": "width to the size, height cut",
    "pad": "all of it, on a white square",
    "budget": "the proportions kept, as many pixels as a square",
    "long": "the proportions kept, long side to the size",
}
IMAGES = {
    "link": "hard links; copies where there can be none (default)",
    "copy": "files of their own",
    "none": "photographs stay where they are",
}
POINTS = {"depth": "unprojected depth (default)", "head": "the network's own points, where it has such a head"}
TRACKS = {
    "auto": "measured where pycolmap is installed, else projected (default)",
    "measure": "of matched images",
    "project": "of the points",
    "head": "followed by the network's own track head",
}
ENGINE = {
    "local": "this process (default)",
    "ray": "workers on a Ray cluster that keep the model; extra ray",
}
PROTECT = {"fp8": "8-bit floats (default)", "float": "as they are"}
SEARCH = {
    "awq": "layer by layer (default)",
    "task": "by the network's outputs, ten times as long",
    "none": "no scales",
}
ROUNDING = {
    "compensated": "GPTQ: later weights make up for it, but for fp8 (default)",
    "nearest": "each to its nearest code",
}


def listed(table: Mapping[str, str]) -> str:
    """A table for a help text: a name and what it does on each line."""
    return "".join(f"\n  {name}: {what}" for name, what in table.items()).replace("%", "%%")


def one_of(what: str, table: Mapping[str, str], group: str | None = None) -> Callable[[str], str]:
    """The type of an option that takes registered names, with commas: a typo is found before anything is imported.

    Args:
        what: Is registered, as messages call it.
        table: Names of ours.
        group: Entry points ``geoaccel.GROUP``, by which other packages register more. Where one does, names that are
            not ours are left to the registry.
    """

    def names(text: str) -> str:
        if not text.strip(" ,"):
            raise argparse.ArgumentTypeError(f"{text!r} names no {what}; write none, or leave the option out")
        for name in (part.strip() for part in text.split(",")):
            if name not in ("", "none", *table) and not _others(group):
                raise argparse.ArgumentTypeError(unknown(what, name, list(table)))
        return text

    return names


def _others(group: str | None) -> bool:
    from importlib.metadata import entry_points

    return group is not None and bool(entry_points(group=f"geoaccel.{group}"))
