"""Photographs to choose by, and others of the same scenes to check with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.fingerprint import of_file
from geoaccel.images import check_file, is_photograph, load_images, natural_key
from geoaccel.quantization.calibrate.clip import Clip

LEAST = 4
MOST = 16  # photographs of a half that the model sees at a time, unless told otherwise


@dataclass(frozen=True)
class Halves:
    """One clip of each scene to choose by, one to check with, and all photographs of the first scene for the time.

    Attributes:
        choosing, unseen: Clips of the same scenes; no photograph is in both.
        together: Both clips of the first scene as one.
    """

    choosing: list[Clip]
    unseen: list[Clip]
    together: Clip

    def describe(self) -> dict[str, list[list[str]]]:
        """Fingerprints of the photographs, clip by clip: the same ones as other clips have other errors."""
        return {
            "choosing": [[of_file(path) for path in clip.files] for clip in self.choosing],
            "unseen": [[of_file(path) for path in clip.files] for clip in self.unseen],
        }


def halves(folders: Sequence[str], model: nn.Module, frames: int | None = None) -> Halves:
    """Photographs of folders, one scene each, alternately to choose by and to check with.

    Args:
        folders: With photographs; their order is that of the names.
        model: Whose preprocessing they get.
        frames: Photographs of a half that the model sees at a time, evenly spread over it; None: all, at most ``MOST``.

    Raises:
        ValueError: If a folder holds too few.
        FileNotFoundError: For a folder that is not there.
    """
    choosing: list[Clip] = []
    unseen: list[Clip] = []
    for name, *both_halves in find_halves(folders, frames):
        for files, clips in zip(both_halves, (choosing, unseen), strict=True):
            clips.append(_clip(name, files, model))
    both = sorted((*choosing[0].files, *unseen[0].files), key=natural_key)
    return Halves(choosing, unseen, _clip(Path(folders[0]).name, both, model))


def find_halves(folders: Sequence[str], frames: int | None = None) -> list[tuple[str, list[Path], list[Path]]]:
    """Name, files to choose by and files to check with of each folder; no pixels are decoded.

    Raises:
        ValueError: As of `halves`, or if a file is no image.
        FileNotFoundError: For a folder that is not there.
    """
    if frames is not None and frames < 2:
        raise UserError(f"--frames {frames}: cameras are compared in pairs; give 2 or more")
    found = []
    places = [Path(folder).expanduser() for folder in folders]
    for i, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if not place.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} with photographs")
        if any(place.samefile(other) for other in places[:i]):
            raise UserError(f"{folder} is given twice; give each folder once")
        files = sorted((path for path in place.iterdir() if is_photograph(path)), key=natural_key)
        needed = 2 * (frames or LEAST // 2)
        if len(files) < needed:
            each = needed // 2
            raise UserError(
                f"{folder} holds {len(files)} photographs, {needed} are needed: {each} to choose by and {each} others "
                "to check with; add some" + (", or lower --frames" if each > 2 else "")
            )
        choosing, unseen = (_spread(half, frames or MOST) for half in (files[0::2], files[1::2]))
        for path in (*choosing, *unseen):
            check_file(path)
        found.append((place.name, choosing, unseen))
    return found


def _spread(files: list[Path], most: int) -> list[Path]:
    """At most so many, evenly spread, the first one always."""
    count = min(most, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _clip(name: str, files: list[Path], model: nn.Module) -> Clip:
    preprocess: Any = model.preprocess

    @functools.cache  # every trial reads the same pixels
    def load() -> Tensor:
        return load_images(list(files), preprocess).images[None]

    return Clip(name, load, None, tuple(files))
