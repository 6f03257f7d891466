"""Files written from a scene: one module per format, each with `write(scene, cloud, folder)`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from geoaccel.atomic import atomic_folder, check_output_folder, require_no_clash
from geoaccel.claims import claimed, resolve
from geoaccel.errors import UserError, UserTypeError
from geoaccel.export.formats import FORMATS, IMAGE_FOLDER, NEEDS, WITH_IMAGES, WRITES, why_not
from geoaccel.manifest import files_in, staying
from geoaccel.point_cloud import PointCloud
from geoaccel.registry import unknown
from geoaccel.scene import Scene

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "IMAGES",
    "atomic_folder",
    "check_formats",
    "check_images",
    "check_names",
    "check_output_folder",
    "claimed",
    "holds_tracks",
    "planned",
    "read_formats",
    "write",
    "write_into",
]

logger = logging.getLogger(__name__)

DEFAULT_FORMATS = ("ply", "glb", "colmap")
EVERY = "all"
Images = Literal["link", "copy", "none"]
IMAGES: tuple[str, ...] = get_args(Images)
_UTF8_NAMES = ("colmap", "colmap-text")


def read_formats(formats: str | Sequence[str]) -> list[str]:
    """Names of formats from a list or comma-separated text; ``all``: every one that can be written here.

    Raises:
        ValueError: If there is none, or one is unknown.
        MissingPackage: If one of them needs a package that cannot be imported.
    """
    if not isinstance(formats, Iterable):
        raise UserTypeError(f"formats is {formats!r}; give names, as 'ply,colmap', or 'all'")
    parts = formats.split(",") if isinstance(formats, str) else list(formats)
    names = [name.strip() if isinstance(name, str) else name for name in parts]
    names = list(dict.fromkeys(name for name in names if name != ""))
    if not names:
        raise UserError(f"no output format was given; known: {', '.join(sorted(FORMATS))}, {EVERY}")
    if EVERY in names:
        reasons = {name: why_not(name) for name in sorted(FORMATS)}
        for name, reason in reasons.items():
            if reason is not None:
                logger.warning("formats=all leaves out %s: %s", name, reason)
        return [name for name, reason in reasons.items() if reason is None]
    for name in names:
        FORMATS[name]
        if name in NEEDS:
            NEEDS[name]()
    return names


def holds_tracks(formats: Sequence[str]) -> bool:
    """Whether one of these formats stores observations of points."""
    return any(name in ("colmap", "colmap-text") for name in formats)


def check_formats(formats: str | Sequence[str]) -> None:
    """Raise what `read_formats` would raise."""
    read_formats(formats)


def check_images(
    images: str,
    formats: Sequence[str],
    frames: Sequence[tuple[str, Path | None]],
    folder: str | Path,
    masks: Iterable[Path] = (),
) -> None:
    """Refuse a choice of `images` that does not exist, or does not work for these photographs.

    Args:
        images: As in `write`.
        formats: Names of formats.
        frames: Name and file of each photograph.
        folder: Where the result will be.
        masks: Files of the masks.

    Raises:
        ValueError: Saying what works.
        FileExistsError: The result would need the name of a folder that holds photographs or masks.
    """
    if images not in IMAGES:
        raise UserError(unknown("choice of images", images, list(IMAGES)))
    from geoaccel.export.frames import all_in_images, why_not_as_they_are

    root, paths = resolve(folder), [path for _, path in frames]
    stay = staying(root, [*masks, *(path for path in paths if path is not None)])
    in_place = IMAGE_FOLDER in stay and all_in_images(paths, root)
    written = {file.partition("/")[0] for files in planned(formats, images).values() for file in files}
    require_no_clash(root, stay - {IMAGE_FOLDER} if in_place else stay, written)
    if not WITH_IMAGES & set(formats):
        return
    if (images == "none" or in_place) and (reasons := why_not_as_they_are(frames)):
        where = "with --images none" if images == "none" else f"because {folder} already contains images/"
        raise UserError(
            f"photographs are used in place {where}, but {reasons[0]}; use --images link and another output folder"
        )


def planned(formats: Sequence[str], images: str = "link") -> dict[str, tuple[str, ...]]:
    """Files and folders that each format will write; formats of other packages may not declare theirs."""
    brought = {IMAGE_FOLDER: (f"{IMAGE_FOLDER}/",)} if WITH_IMAGES & set(formats) and images != "none" else {}
    return brought | {name: WRITES.get(name, (name,)) for name in formats}


def check_names(names: Iterable[str], formats: Sequence[str]) -> None:
    """Refuse image names that a format cannot store: file names may be any bytes, these formats need UTF-8."""
    strict = [name for name in formats if name in _UTF8_NAMES]
    for name in names if strict else ():
        try:
            name.encode()
        except UnicodeEncodeError:
            readable = os.fsencode(name).decode(errors="backslashreplace")
            raise UserError(
                f"the name of image {readable} is not UTF-8, which {strict[0]} needs; rename the file, or leave "
                f"out {', '.join(dict.fromkeys(strict))}"
            ) from None


def write(
    scene: Scene,
    cloud: PointCloud,
    folder: str | Path,
    formats: str | Sequence[str],
    *,
    images: str = "link",
    overwrite: bool = False,
) -> None:
    """Write every format into `folder`, which appears when all are complete; ``files.json`` describes each file.

    Args:
        scene: The scene.
        cloud: Its points.
        folder: Output folder.
        formats: As for `read_formats`.
        images: How ``images/`` is filled for formats that name photographs: ``link``, ``copy`` or ``none``.
        overwrite: Replace an earlier result.
    """
    names = read_formats(formats)
    check_names(scene.names, names)
    check_images(images, names, list(zip(scene.names, scene.paths, strict=True)), folder, scene.mask_files or [])
    about: dict[str, Any] = dict(scene.notes)
    with atomic_folder(folder, overwrite=overwrite, inputs=scene.inputs, about=about) as work:
        about |= write_into(work, scene, cloud, names, images=images)


def write_into(
    work: Path, scene: Scene, cloud: PointCloud, names: Sequence[str], *, images: str = "link"
) -> dict[str, Any]:
    """Write every format into a temporary folder, and return their entries for ``files.json``.

    Args:
        work: From `atomic_folder`, or a folder in it.
        scene: The scene.
        cloud: Its points.
        names: Names of formats, checked.
        images: As in `write`.
    """
    from geoaccel.export.frames import place_images

    of_each: dict[str, list[str]] = {}
    if WITH_IMAGES & set(names):
        place_images(scene, work, images)
        of_each[IMAGE_FOLDER] = files_in(work)
    for name in sorted(names, key="nerfstudio".__eq__):  # last, as it names files of others
        before = set(files_in(work))
        FORMATS[name](scene, cloud, work)
        of_each[name] = [file for file in files_in(work) if file not in before]
    return describe(scene, cloud, work, of_each)


def describe(scene: Scene, cloud: PointCloud, work: Path, of_each: dict[str, list[str]]) -> dict[str, Any]:
    """Entries of ``files.json`` besides the files of a result."""
    from geoaccel.export.frames import image_files

    named = image_files(scene, work) if WITH_IMAGES & of_each.keys() else [None] * len(scene)
    frames = [
        {"name": name, "image": file, "height": transform.original_size[0], "width": transform.original_size[1]}
        for name, file, transform in zip(scene.names, named, scene.transforms, strict=True)
    ]
    return {"unit": scene.unit, "points": len(cloud), "frames": frames, "formats": of_each}
