"""What several formats need to know about the frames: their photographs on disk, and one colour for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from geoaccel.reconstruction import Reconstruction

IMAGE_FOLDER = "images"
_EXIF_ORIENTATION = 0x0112


def photograph_files(reconstruction: Reconstruction, folder: Path) -> list[str]:
    """The photograph of each frame as a path relative to `folder`, in pixels of the exported cameras.

    Files that can be used as they are stay where they are. Only what has none (video frames, tensors), or is rotated
    by an EXIF tag that other programs tend to ignore, is written to ``images/`` under the frame's name.
    """
    return [_photograph_file(reconstruction, i, folder) for i in range(len(reconstruction))]


def _photograph_file(reconstruction: Reconstruction, i: int, folder: Path) -> str:
    path, original_size = reconstruction.paths[i], reconstruction.transforms[i].original_size
    if path is not None and _stored_upright(path, original_size):
        try:
            return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
        except ValueError:  # another drive of a Windows machine
            return path.resolve().as_posix()

    from PIL import Image

    target = folder / IMAGE_FOLDER / reconstruction.names[i]
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        target = target.with_name(target.name + ".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(reconstruction.read_original(i).numpy()).save(target, quality=95)
    return target.relative_to(folder).as_posix()


def _stored_upright(path: Path, original_size: tuple[int, int]) -> bool:
    """True if the file's own rows and columns are those of the photograph. Reads only the header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(_EXIF_ORIENTATION, 1) == 1 and image.size == original_size[::-1]
    except OSError:
        return False


def frame_colors(count: int) -> np.ndarray:  # [S, 3] in [0, 1], sRGB
    """Colours that run from blue over green to red with time, readable on light and dark ground."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.08, 0.92, count))[:, :3]
