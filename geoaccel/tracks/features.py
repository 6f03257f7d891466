"""Local features of photographs, by pycolmap's SIFT on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from geoaccel.errors import UserError
from geoaccel.scene import Scene

if TYPE_CHECKING:
    from geoaccel.images.threads import Room

# Features are detected in images of at most this many pixels along the longer side; above FINE, without upsampling.
LARGEST, FINE = 1600, 800
MAX_FEATURES = 4096
PEAK_THRESHOLD = 0.004  # COLMAP's 0.0067 misses half of the features of smooth surfaces
INSTALL = "pip install 'geoaccel[refine]'"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one image.

    Attributes:
        pixels: (u, v) in the original image [K, 2], float64.
        descriptors: Of unit length [K, D], float32; their dot products measure similarity.
        picture: The image used for detection [h, w], grey levels, uint8.
        scale: Original pixels per pixel of `picture`, which limits the accuracy of `pixels`.
    """

    pixels: np.ndarray
    descriptors: np.ndarray
    picture: np.ndarray
    scale: float


def pycolmap_here() -> bool:
    """Whether a sufficient version of pycolmap is installed."""
    try:
        import pycolmap
    except ImportError:
        return False
    return hasattr(pycolmap, "FeatureExtractor")


def require_pycolmap(what: str) -> Any:
    """The package, or an error that says how to install it."""
    if not pycolmap_here():
        raise UserError(f"{what} needs pycolmap 4.2 or later, which is not installed: {INSTALL}")
    import pycolmap

    return pycolmap


@contextmanager
def quiet() -> Iterator[None]:
    """Restrict COLMAP's log to errors within the block."""
    import pycolmap

    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = 2
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


def find_features(scene: Scene) -> list[Features]:
    """SIFT features of each original photograph."""
    from geoaccel.images.threads import PIXELS_AT_ONCE, Room, in_order, usable_cores  # imports Pillow

    require_pycolmap("finding features")
    work = partial(_features, scene, Room(PIXELS_AT_ONCE))
    with quiet():
        return list(in_order(range(len(scene)), work, threads=usable_cores()))


def _features(scene: Scene, room: Room, i: int) -> Features:
    import pycolmap
    from PIL import Image

    height, width = scene.transforms[i].original_size
    scale = max(1.0, max(width, height) / LARGEST)
    with room.held(width * height):
        picture = Image.fromarray(scene.read_original(i).numpy()).convert("L")
        if scale > 1:
            picture = picture.resize((round(width / scale), round(height / scale)), Image.Resampling.LANCZOS)
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, 1
    options.sift.max_num_features = MAX_FEATURES
    options.sift.peak_threshold = PEAK_THRESHOLD
    options.sift.first_octave = -1 if max(picture.size) <= FINE else 0
    extractor = pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    grey = np.array(picture)
    keypoints, found = extractor.extract_from_uint8_array(grey)
    if not len(keypoints):
        return Features(np.zeros((0, 2)), np.zeros((0, 128), np.float32), grey, scale)
    pixels = pycolmap.keypoints_to_matrix(keypoints)[:, :2].astype(np.float64)
    descriptors = found.data.astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True).clip(1e-9)
    return Features(pixels * (width / picture.width, height / picture.height), descriptors, grey, scale)
