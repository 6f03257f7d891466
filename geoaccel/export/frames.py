"""Image files of the frames, and a colour for each, shared by several formats."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from geoaccel.atomic import final_folder
from geoaccel.errors import UserError
from geoaccel.export.formats import IMAGE_FOLDER
from geoaccel.images.read import opened, read_mask
from geoaccel.manifest import staying
from geoaccel.scene import Scene

MASK_FOLDER = "masks"
_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # anything else, such as 0, no program turns
_WRITTEN = (".png", ".jpg", ".jpeg")


def place_images(scene: Scene, folder: Path, how: str = "link") -> None:
    """Fill ``images/``: every frame under its own name, upright, in pixels of the exported cameras.

    Files that can be used unchanged become links or copies. Images without a file (video frames, tensors), with an EXIF
    rotation that other programs tend to ignore, or in HEIC, are written. Nothing is done if the photographs are already
    in ``images/`` of the output folder.

    Args:
        scene: With its photographs.
        folder: Temporary folder of the result.
        how: ``link`` (hard links, which survive moving, zipping or copying the folder; copies if not supported),
            ``copy``, or ``none``: the photographs are used in place (`why_not_as_they_are`).

    Raises:
        ValueError: If two frames would have the same file.
    """
    if how == "none" or _in_place(scene, folder):
        return
    for i, (name, path) in enumerate(zip(_file_names(scene), scene.paths, strict=True)):
        target = folder / IMAGE_FOLDER / name
        # An existing file may be a link to a photograph of the user, which would be overwritten.
        if os.path.lexists(target):
            raise UserError(f"two images would be {IMAGE_FOLDER}/{name} of the result; rename one, or leave it out")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path is None or not _usable(scene, i):
            _write_photograph(scene, i, target)
        elif how == "copy" or not _linked(path.resolve(), target):
            shutil.copyfile(path, target)


def image_names(scene: Scene, folder: Path) -> list[str]:
    """The image of each frame as a path relative to their common folder, COLMAP's ``image_path``.

    That is ``images/`` of the result, or, without one, the photographs' own folder.
    """
    _ensure(scene, folder)
    if (folder / IMAGE_FOLDER).is_dir():
        return _file_names(scene)
    places = [_place(path) for path in scene.paths if path is not None]
    root = _place(final_folder(folder)) / IMAGE_FOLDER
    if not all(place.is_relative_to(root) for place in places):
        root = Path(os.path.commonpath([place.parent for place in places]))
    return [place.relative_to(root).as_posix() for place in places]


def image_files(scene: Scene, folder: Path) -> list[str]:
    """The image of each frame as a path relative to `folder`."""
    _ensure(scene, folder)
    if (folder / IMAGE_FOLDER).is_dir():
        return [f"{IMAGE_FOLDER}/{name}" for name in _file_names(scene)]
    return [_relative(path, final_folder(folder)) for path in scene.paths if path is not None]


def why_not_as_they_are(frames: Sequence[tuple[str, Path | None]]) -> list[str]:
    """Why photographs cannot be used in place by other programs; reads only their headers."""
    seen: set[Path] = set()
    reasons = []
    for name, path in frames:
        if path is None:
            reasons.append(f"{name} has no file of its own")
        elif not _stored_upright(path):
            reasons.append(f"{path} is rotated by its EXIF tag, or in a format that few programs read")
        elif path.resolve() in seen:
            reasons.append(f"{path} is listed twice")
        else:
            seen.add(path.resolve())
    return reasons


def _ensure(scene: Scene, folder: Path) -> None:
    """For a writer that is called directly: write images that have no file."""
    if not (folder / IMAGE_FOLDER).is_dir() and not all(_usable(scene, i) for i in range(len(scene))):
        place_images(scene, folder)


def _in_place(scene: Scene, folder: Path) -> bool:
    """Whether the photographs lie in ``images/`` of the folder where the result will be."""
    root = final_folder(folder)
    return IMAGE_FOLDER in staying(_place(root), scene.inputs) and all_in_images(scene.paths, root)


def all_in_images(paths: Sequence[Path | None], folder: Path) -> bool:
    """Whether every photograph is a file in ``images/`` of a folder."""
    root = _place(folder) / IMAGE_FOLDER
    return all(path is not None and _place(path).is_relative_to(root) for path in paths)


def write_masks(scene: Scene, folder: Path) -> list[str]:
    """Write single-channel masks at the size of the photographs, named as COLMAP requires; returns relative paths."""
    from PIL import Image

    root = final_folder(folder)
    # The user's own masks may be there, in any format that we read.
    place = MASK_FOLDER if MASK_FOLDER not in staying(root, scene.inputs) else f"{MASK_FOLDER}-read"
    files = [f"{place}/{name}.png" for name in _file_names(scene)]
    for i, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_mask(scene, i).astype(np.uint8) * 255).save(folder / file)
    return files


def _mask(scene: Scene, i: int) -> np.ndarray:  # [H0, W0] bool
    """What masks keep of an image: its file as it is, less what they leave out besides."""
    assert scene.selected is not None
    transform, selected = scene.transforms[i], scene.selected[i]
    kept: np.ndarray = transform.nearest_to_original(selected).numpy()
    if scene.mask_files is None:
        return kept
    mask = read_mask(scene.mask_files[i])
    # At the size of the network edges are coarser.
    return mask if torch.equal(transform.nearest(torch.from_numpy(mask)), selected) else mask & kept


def _linked(path: Path, target: Path) -> bool:
    """Make a hard link, if possible."""
    try:
        os.link(path, target)
    except OSError:  # another disk, no hard links, or a file of another user
        return False
    return True


def _place(path: Path) -> Path:
    """Path of a file with links in its folder resolved, but not the file itself."""
    return path.parent.resolve() / path.name


def _file_names(scene: Scene) -> list[str]:
    """File name of each frame in ``images/``: its own, with ``.png`` added if it must be written in another format."""
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
    """Write one upright, at the size of its camera; never overwrites a file."""
    from PIL import Image

    with target.open("xb") as file:
        # PNG's default level compresses hardly better, and takes several times as long.
        Image.fromarray(scene.read_original(i).numpy()).save(file, quality=95, compress_level=1)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(_place(path), folder.resolve())).as_posix()
    except ValueError:  # another drive of a Windows machine
        return path.resolve().as_posix()


def _usable(scene: Scene, i: int) -> bool:
    """Whether the frame has a file that other programs read in the same way."""
    path = scene.paths[i]
    return path is not None and _stored_upright(path, scene.transforms[i].original_size)


def _stored_upright(path: Path, original_size: tuple[int, int] | None = None) -> bool:
    """Whether the file stores the image upright. Reads only the header."""
    try:
        with opened(path) as image:
            known = image.format is not None  # few programs read HEIC
            same = original_size is None or image.size == original_size[::-1]
            return known and image.getexif().get(_EXIF_ORIENTATION) not in _TURNED and same
    except (OSError, UserError):
        return False


def frame_colors(count: int) -> np.ndarray:  # [S, 3] in [0, 1], sRGB
    """Colours that run from blue over green to red with time, readable on light and dark ground."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.08, 0.92, count))[:, :3]
