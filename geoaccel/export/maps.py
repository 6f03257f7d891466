"""Depth and confidence as image files at the size of each photograph: for robots, renderers and depth supervision.

``depth``
    ``depth/NAME.png``, 16 bits: thousandths of the scene's unit (millimetres where that is the metre), which is what
    nerfstudio reads. If a depth exceeds 65 units it is a coarser power of ten, and if none reaches half a unit a finer
    one. 0 is no depth. ``depth/scale.json`` gives the steps per unit, also read by our ``--depths``, and the unit.
``depth-exr``
    ``depth-exr/NAME.exr``: the same as 32-bit floats in the channel ``Z`` (extra ``exr``).
``confidence``
    ``confidence/NAME.png``, 8 bits: the rank within the scene, 255 the most and 1 the least confident pixel, since only
    the order of confidences is comparable across models. 0 is no prediction.

Pixels that masks leave out are 0 in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from geoaccel.errors import MissingPackage
from geoaccel.export.formats import FORMATS, NEEDS, WRITES
from geoaccel.images import given
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

DEPTH_FOLDER, EXR_FOLDER, CONFIDENCE_FOLDER = "depth", "depth-exr", "confidence"
SCALE_FILE = f"{DEPTH_FOLDER}/{given.SCALE_FILE}"
STEPS = given.MILLIMETRES
"""Steps per unit of 16-bit depth."""
_LARGEST = 65535
_FEWEST = 500
"""Steps to the farthest depth, below which surfaces are terraces."""

WRITES["depth"], WRITES["depth-exr"] = (f"{DEPTH_FOLDER}/",), (f"{EXR_FOLDER}/",)
WRITES["confidence"] = (f"{CONFIDENCE_FOLDER}/",)


@FORMATS.register("depth")
def write_depth(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write PNGs of 16 bits, and their scale."""
    from PIL import Image

    steps, scene = depth_steps(scene), replace(scene, mask=scene.kept)
    for i, path in _targets(scene, folder / DEPTH_FOLDER, ".png"):
        depth = (scene.original_depth(i).double() * steps).round().clamp(0, _LARGEST).numpy().astype(np.uint16)
        Image.fromarray(depth).save(path)
    document = {given.STEPS_PER_UNIT: steps, "unit": scene.unit}
    (folder / SCALE_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")


@FORMATS.register("depth-exr")
def write_exr(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write one EXR for each image."""
    exr, scene = load_openexr(), replace(scene, mask=scene.kept)
    for i, path in _targets(scene, folder / EXR_FOLDER, ".exr"):
        header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage, "unit": scene.unit}
        with exr.File(header, {"Z": np.ascontiguousarray(scene.original_depth(i).float().numpy())}) as file:
            file.write(str(path))


@FORMATS.register("confidence")
def write_confidence(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write PNGs of 8 bits."""
    from PIL import Image

    valid = scene.conf[scene.mask].sort().values
    for i, path in _targets(scene, folder / CONFIDENCE_FOLDER, ".png"):
        rank = torch.searchsorted(valid, scene.conf[i].contiguous(), right=True) / max(len(valid), 1)
        # Nearest neighbour: an interpolated rank would be meaningless.
        value = scene.transforms[i].nearest_to_original((1 + 254 * rank).round().where(scene.kept[i], 0.0))
        Image.fromarray(value.numpy().astype(np.uint8)).save(path)


NEEDS["depth-exr"] = lambda: load_openexr()


def load_openexr() -> ModuleType:
    """Import OpenEXR.

    Raises:
        MissingPackage: In one line.
    """
    try:
        import OpenEXR
    except ImportError as error:
        raise MissingPackage("format depth-exr needs OpenEXR: pip install 'geoaccel[exr]'") from error
    return OpenEXR


def depth_steps(scene: Scene) -> float:
    """Steps per unit of 16-bit depth: `STEPS`, or the next power of ten with which all depths fit and differ."""
    steps, farthest = STEPS, float(scene.depth[scene.kept].max()) if scene.kept.any() else 1.0
    while farthest * steps > _LARGEST:
        steps /= 10
    if 0 < farthest * steps < _FEWEST:
        while 10 * farthest * steps <= _LARGEST:
            steps *= 10
    return steps


def map_names(scene: Scene, suffix: str) -> list[str]:
    """File name of each frame's map, as our own ``--depths`` finds it."""
    return [f"{stem}{suffix}" for stem in given.map_stems(scene.names)]


def _targets(scene: Scene, folder: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    for i, name in enumerate(map_names(scene, suffix)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        yield i, path
