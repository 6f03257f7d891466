"""What options may be called by name, each in half a line. Tests hold these tables to the registries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from geoaccel.registry import unknown

MERGING = {
    "asymmetric": "ours: queries attend to a fixed subset of keys; smallest loss of accuracy",
    "alike": "ours: merges similar neighbouring patches, from the encoder on",
    "httm": "each head merges queries and keys among nearby frames",
    "fastvggt": "merges into random patches, anywhere in the scene",
    "litevggt": "keeps edges, merges into flat patches, reuses the matching",
    "come": "merges where confidence will be low; needs a trained predictor",
    "avggt": "early layers attend within frames, the others to a grid of keys",
}
QUANTIZATION = {"fp8": "8-bit floats for weights and activations", "w4a16": "4-bit weights, the smallest files"}
ATTENTION = {
    "sdpa": "torch's fused kernels (default)",
    "xformers": "memory-efficient attention; extra cuda",
    "matmul": "unfused reference, for comparison",
    "fp8": "8-bit floats; fast only on recent GPUs",
}
DTYPES = {
    "auto": "chosen for this device; geoaccel info says which (default)",
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
    "view": "for geoaccel view, with confidence and depth edges",
    "npz": "every array",
    "depth": "depth maps, 16-bit PNG",
    "depth-exr": "depth maps, float EXR; extra exr",
    "confidence": "confidence maps, 8-bit PNG",
    "mesh": "surface mesh by TSDF fusion; extra mesh",
    "tum": "trajectory in TUM format",
    "kitti": "trajectory in KITTI format",
}
MODES = {
    "crop": "resize the width to --size, crop the height",
    "pad": "whole image, padded to a white square",
    "budget": "keep the aspect ratio, with as many pixels as a square",
    "long": "keep the aspect ratio, long side to --size",
}
IMAGES = {
    "link": "hard links, or copies where links are impossible (default)",
    "copy": "copies",
    "none": "nothing; files refer to the photographs where they are",
}
POINTS = {"depth": "unprojected depth (default)", "head": "points of the network's point head, if it has one"}
TRACKS = {
    "auto": "measure if pycolmap is installed, else project (default)",
    "measure": "matched features",
    "project": "projections of the points",
    "head": "tracks of the network's own track head",
}
ENGINE = {
    "local": "this process (default)",
    "ray": "workers on a Ray cluster, each with the model loaded; extra ray",
}
PROTECT = {"fp8": "8-bit floats (default)", "float": "not quantized"}
SEARCH = {
    "awq": "layer by layer (default)",
    "task": "by the network's outputs; takes ten times as long",
    "none": "no scales",
}
ROUNDING = {
    "compensated": "GPTQ: later weights make up for earlier errors; not for fp8 (default)",
    "nearest": "round to nearest",
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
            raise argparse.ArgumentTypeError(f"{text!r} names no {what}; give none, or leave out the option")
        for name in (part.strip() for part in text.split(",")):
            if name not in ("", "none", *table) and not _others(group):
                raise argparse.ArgumentTypeError(unknown(what, name, list(table)))
        return text

    return names


def _others(group: str | None) -> bool:
    from importlib.metadata import entry_points

    return group is not None and bool(entry_points(group=f"geoaccel.{group}"))
