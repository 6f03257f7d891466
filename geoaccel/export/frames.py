"""Image files of the frames, and one colour for each, as several formats need them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from geoaccel.atomic import final_folder
from geoaccel.errors import UserError
from geoaccel.images.read import opened
from geoaccel.scene import Scene

IMAGE_FOLDER = "images"
_EXIF_ORIENTATION = 0x0112
_WRITTEN = (".png", ".jpg", ".jpeg")


def photograph_files(scene: Scene, folder: Path) -> list[str]:
    """The image of each frame as a path relative to `folder`, in pixels of the exported cameras.

    Files that can be used as they are stay where they are. Only what has none (video frames, tensors), or is rotated
    by an EXIF tag that other programs tend to ignore, is written to ``images/`` under the frame's name.
    """
    files = []
    for i, (name, path) in enumerate(zip(_file_names(scene), scene.paths, strict=True)):
        if path is not None and _usable(scene, i):
            files.append(_relative(path, final_folder(folder)))
        else:
            _write_photograph(scene, i, folder / IMAGE_FOLDER / name)
            files.append(f"{IMAGE_FOLDER}/{name}")
    return files


def image_names(scene: Scene, folder: Path) -> list[str]:
    """The image of each frame as a path relative to one folder that has all of them, in pixels of the cameras.

    That is the user's own folder if every image lies there under the frame's name and can be used as it is. Else
    ``images/`` is made complete: beside what `photograph_files` writes there, it gets copies (no links, so that the
    result can be moved, and editing it never changes an original) of the other images.
    """
    usable = [_usable(scene, i) for i in range(len(scene))]
    if all(usable) and _in_one_folder(scene):
        return list(scene.names)
    names = _file_names(scene)
    for i, (name, path) in enumerate(zip(names, scene.paths, strict=True)):
        target = folder / IMAGE_FOLDER / name
        if not (usable[i] and path is not None):
            _write_photograph(scene, i, target)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return names


def _file_names(scene: Scene) -> list[str]:
    """Of each frame in ``images/``: its own, with ``.png`` added where such a file must be written and cannot be."""
    taken = set(scene.names)
    names = []
    for i, name in enumerate(scene.names):
        if not name.lower().endswith(_WRITTEN) and not _usable(scene, i):
            name += ".png"
            while name in taken:
                name = f"{name[:-4]}_.png"
            taken.add(name)
        names.append(name)
    return names


def _write_photograph(scene: Scene, i: int, target: Path) -> None:
    """Write one upright, at the size of its camera, unless another format did."""
    from PIL import Image

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # PNG packs hardly tighter at its usual level, in several times the time.
        Image.fromarray(scene.read_original(i).numpy()).save(target, quality=95, compress_level=1)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of a Windows machine
        return path.resolve().as_posix()


def _in_one_folder(scene: Scene) -> bool:
    """Whether the names are those of the files, from one folder on. A file that is listed twice has another name."""
    folders = set()
    for path, name in zip(scene.paths, scene.names, strict=True):
        text = "" if path is None else path.absolute().as_posix()
        folders.add(text.removesuffix(f"/{name}") if text.endswith(f"/{name}") else None)
    return len(folders) == 1 and None not in folders


def _usable(scene: Scene, i: int) -> bool:
    """Whether the frame has a file that other programs read as we do."""
    path = scene.paths[i]
    return path is not None and _stored_upright(path, scene.transforms[i].original_size)


def _stored_upright(path: Path, original_size: tuple[int, int]) -> bool:
    """True if the file's own rows and columns are those of the image. Reads only the header."""
    try:
        with opened(path) as image:
            known = image.format is not None  # HEIC few programs read
            return known and image.getexif().get(_EXIF_ORIENTATION, 1) == 1 and image.size == original_size[::-1]
    except (OSError, UserError):
        return False


def frame_colors(count: int) -> np.ndarray:  # [S, 3] in [0, 1], sRGB
    """Colours that run from blue over green to red with time, readable on light and dark ground."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.08, 0.92, count))[:, :3]
