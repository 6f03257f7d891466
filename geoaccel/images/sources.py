"""Image sources (files, folders, videos) as a list of images that are read one by one."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from geoaccel.errors import UserError, UserTypeError
from geoaccel.images.read import IMAGE_SUFFIXES, array_to_image, one_line, read_image, upright
from geoaccel.images.video import VIDEO_SUFFIXES, Video
from geoaccel.manifest import written_files

OneImage: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
_GLOB = re.compile(r"[*?\[]")


@runtime_checkable
class Picture(Protocol):
    """One image that can be read again."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    def read(self) -> Image.Image:
        """RGB, or RGBA if some pixels are transparent (:func:`geoaccel.images.read.upright`)."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path
    name: str

    def read(self, before: Callable[[Image.Image], None] | None = None) -> Image.Image:
        return read_image(self.path, before)


@dataclass(frozen=True)
class VideoPicture:
    """One frame of a video."""

    video: Video
    stamp: int
    name: str
    path: None = None

    def read(self) -> Image.Image:
        return self.video.read(self.stamp)


@dataclass(frozen=True, eq=False)
class MemoryPicture:
    """An image in memory; the user's own object, not a copy."""

    data: Image.Image | np.ndarray | Tensor
    name: str
    path: None = None

    def read(self) -> Image.Image:
        try:
            return upright(self.data) if isinstance(self.data, Image.Image) else array_to_image(self.data)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.name}: {one_line(error)}") from error


ImageSource: TypeAlias = OneImage | Sequence[OneImage] | Sequence[Picture]


def natural_key(text: str | os.PathLike[str]) -> tuple[list[str | int], str]:
    """Sort key under which ``img_9`` comes before ``img_10``.

    Example:
        >>> sorted(["img_10.jpg", "img_9.jpg"], key=natural_key)
        ['img_9.jpg', 'img_10.jpg']
    """
    text = os.fspath(text)
    parts: list[str | int] = [
        int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text.casefold()))
    ]
    return parts, text


def list_pictures(
    source: ImageSource, fps: float | None = None, max_frames: int | None = None, *, recursive: bool = False
) -> list[Picture]:
    """List the images of ``source``, subsampled evenly to ``max_frames``. Opens video containers, but no images.

    Args:
        source: As :func:`geoaccel.images.load_images` takes it.
        fps: Frames per second of a video.
        max_frames: Upper bound.
        recursive: Search the subfolders of a folder, too.

    Raises:
        FileNotFoundError: A path does not exist, or a pattern matches nothing.
        ValueError: There is no image, or the source is invalid.
    """
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise UserError(f"fps={fps} must be a positive number of frames per second")
    if isinstance(source, list) and source and all(isinstance(item, Picture) for item in source):
        return cast(list[Picture], source)  # from an earlier call, chosen already
    paths, video = _resolve(source, recursive)
    if video is not None:
        stamps = thin(video.choose(fps), max_frames)
        # Named by frame number in the whole video, so that a frame has the same name at any fps.
        numbers = {stamp: i for i, stamp in enumerate(video.stamps)}
        return [VideoPicture(video, stamp, f"{video.path.stem}_{numbers[stamp]:06d}.png") for stamp in stamps]
    if fps is not None:
        raise UserError(
            f"fps={fps:g} applies only to videos, and these are images; use max_frames (--max-frames) to take fewer"
        )
    if paths is not None:
        paths = thin(paths, max_frames)
        return [FilePicture(path, name) for path, name in zip(paths, _unique_names(paths), strict=True)]
    return _list_mixed(source, max_frames)


def _resolve(source: Any, recursive: bool) -> tuple[list[Path] | None, Video | None]:
    """The image files or the video of a path or pattern; (None, None) for lists and arrays."""
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    if not isinstance(source, str | os.PathLike):
        return None, None
    path = Path(source)
    # An empty string would mean the working directory.
    if os.fspath(source) and path.is_dir():
        return _list_folder(path, recursive), None
    if path.is_file():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return None, Video(path)
        return [path], None
    if _GLOB.search(str(source)):
        return _list_pattern(str(source))
    raise FileNotFoundError(
        f"{os.fspath(source)!r} does not exist; give a folder of images, image files, a pattern "
        f"such as 'photos/*.jpg', or a video"
    )


def is_photograph(path: Path) -> bool:
    """Whether a file in a folder counts as an image; hidden ones do not (``._a.jpg`` of macOS).

    A broken link does: reading it raises an error, whereas leaving it out would go unnoticed.
    """
    there = path.is_file() or (path.is_symlink() and not path.exists())
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES and there


def _list_folder(folder: Path, recursive: bool = False) -> list[Path]:
    """Images directly in a folder, or anywhere in it; if there are none, in its subfolder ``images``.

    Images of an earlier result next to a subfolder, such as its contact sheet, do not count.
    """
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if recursive and (images := _list_below(folder)):
        return images
    images = [entry for entry in entries if is_photograph(entry)]
    if written := written_files(folder):
        images = [entry for entry in images if entry.name not in written]
    if images:
        return sorted(images, key=lambda path: natural_key(path.name))
    nested = [entry for entry in entries if entry.name.lower() == "images" and entry.is_dir()]
    if len(nested) == 1 and folder.name.lower() != "images":
        return _list_folder(nested[0])
    if not entries:
        raise UserError(f"folder {folder} is empty; give a folder with images ({_known(IMAGE_SUFFIXES)})")
    advice = "convert them, or give the right folder"
    videos = sorted(entry.name for entry in entries if entry.suffix.lower() in VIDEO_SUFFIXES)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if videos:
        advice = f"for a video give the file itself, for example {folder / videos[0]}"
    elif folders:
        advice = f"subfolders are not searched: give one, for example {folder / folders[0]}, or use --recursive"
    raise UserError(
        f"folder {folder} has no images among its {len(entries)} entries; allowed: {_known(IMAGE_SUFFIXES)}; {advice}"
    )


def _list_below(folder: Path) -> list[Path]:
    """Images anywhere below a folder, except in hidden folders and among files of an earlier result."""
    written = written_files(folder)
    found = []
    for path in folder.rglob("*"):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        if is_photograph(path) and not hidden and below.as_posix() not in written:
            found.append(path)
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def _list_pattern(pattern: str) -> tuple[list[Path] | None, Video | None]:
    """Image files that match a pattern, or the single video that does."""
    matches = [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
    if not matches:
        raise FileNotFoundError(f"pattern {pattern!r} matches no file; check it, or give a folder of images")
    images = [path for path in matches if path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        return sorted(images, key=lambda path: natural_key(path.as_posix())), None
    videos = [path for path in matches if path.suffix.lower() in VIDEO_SUFFIXES]
    if len(videos) == 1:
        return None, Video(videos[0])
    raise UserError(
        f"pattern {pattern!r} matches {len(matches)} files, but neither images ({_known(IMAGE_SUFFIXES)}) "
        f"nor exactly one video; change the pattern"
    )


def _list_mixed(source: Any, max_frames: int | None) -> list[Picture]:
    """Images of a list, in its order, or of one array."""
    if isinstance(source, np.ndarray | Tensor):
        items: list[OneImage] = list(source) if source.ndim == 4 else [source]
    elif isinstance(source, Image.Image):
        items = [source]
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        items = list(source)
    else:
        raise UserTypeError(
            f"got {type(source).__name__}; allowed: a folder, a pattern, a video, or a list of paths, PIL images, "
            f"arrays [H, W, 3] or tensors [3, H, W]"
        )
    if not items:
        raise UserError("the list of images is empty; give at least one image")
    items = thin(items, max_frames)
    paths = [Path(item) for item in items if isinstance(item, str | os.PathLike)]
    for path in paths:
        _check_listed(path)
    named = _unique_names(paths)
    names, taken = iter(named), {name.casefold() for name in named}
    pictures: list[Picture] = []
    for i, item in enumerate(items):
        if isinstance(item, str | os.PathLike):
            pictures.append(FilePicture(Path(item), next(names)))
        elif isinstance(item, Image.Image | np.ndarray | Tensor):
            pictures.append(MemoryPicture(item, _free_name(f"image_{i:04d}.png", taken)))
        else:
            raise UserTypeError(
                f"entry {i} of the list is {type(item).__name__}; allowed: a path, a PIL image, "
                f"an array [H, W, 3] or a tensor [3, H, W]"
            )
    return pictures


def _check_listed(path: Path) -> None:
    """A list holds image files only."""
    if not path.exists():
        raise FileNotFoundError(f"image {path} does not exist; check the path")
    if path.is_dir():
        raise UserError(f"the list of images contains the folder {path}; list image files, or pass a single folder")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(f"the list of images contains the video {path}; list image files, or pass a single video")


def thin(items: list, max_frames: int | None) -> list:
    """At most ``max_frames`` evenly spaced items, first and last included.

    Raises:
        ValueError: If that is less than one.
    """
    if max_frames is not None and (not isinstance(max_frames, Integral) or max_frames < 1):
        raise UserError(f"max_frames={max_frames!r} must be a whole number, at least 1")
    if max_frames is None or len(items) <= max_frames:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, max_frames).round().astype(int)]


def _unique_names(paths: list[Path]) -> list[str]:
    """File names; with folders if two files share a name; numbered if one file is listed twice."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        absolute = [path.absolute() for path in paths]
        common = Path(os.path.commonpath([path.parent for path in absolute]))
        names = [path.relative_to(common).as_posix() for path in absolute]
    seen: set[str] = set()
    taken = set(names)  # no repeat takes the name of another file
    unique = []
    for name in names:
        unique.append(_free_name(name, taken) if name in seen else name)
        seen.add(name)
        taken.add(unique[-1])
    return unique


def _free_name(name: str, taken: Container[str]) -> str:
    """The name, numbered if it is taken."""
    path, free, repeat = Path(name), name, 1
    while free in taken:
        repeat += 1
        free = path.with_name(f"{path.stem}_{repeat}{path.suffix}").as_posix()
    return free


def _known(suffixes: tuple[str, ...]) -> str:
    return " ".join(suffixes)
