"""Photographs for choosing a plan, and held-out ones of the same scenes for checking it."""

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
MOST = 16  # default maximum of photographs per half


@dataclass(frozen=True)
class Halves:
    """One clip of each scene for choosing, one for checking, and all photographs of the first scene for timing.

    Attributes:
        choosing, unseen: Clips of the same scenes; no photograph is in both.
        together: Both clips of the first scene as one.
    """

    choosing: list[Clip]
    unseen: list[Clip]
    together: Clip

    def describe(self) -> dict[str, list[list[str]]]:
        """Fingerprints of the photographs, clip by clip: the same photographs in other clips have other errors."""
        return {
            "choosing": [[of_file(path) for path in clip.files] for clip in self.choosing],
            "unseen": [[of_file(path) for path in clip.files] for clip in self.unseen],
        }


def halves(folders: Sequence[str], model: nn.Module, frames: int | None = None) -> Halves:
    """Photographs of folders, one scene each, alternately for choosing and for checking.

    Args:
        folders: Folders of photographs, ordered by name.
        model: Model for whose preprocessing they are prepared.
        frames: Photographs per half, evenly spaced; None: all, at most ``MOST``.

    Raises:
        ValueError: If a folder has too few.
        FileNotFoundError: For a missing folder.
    """
    choosing: list[Clip] = []
    unseen: list[Clip] = []
    for name, *both_halves in find_halves(folders, frames):
        for files, clips in zip(both_halves, (choosing, unseen), strict=True):
            clips.append(_clip(name, files, model))
    both = sorted((*choosing[0].files, *unseen[0].files), key=natural_key)
    return Halves(choosing, unseen, _clip(Path(folders[0]).name, both, model))


def find_halves(folders: Sequence[str], frames: int | None = None) -> list[tuple[str, list[Path], list[Path]]]:
    """Name, files for choosing and files for checking of each folder; no pixels are decoded.

    Raises:
        ValueError: As in `halves`, or if a file is not an image.
        FileNotFoundError: For a missing folder.
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
                f"{folder} holds {len(files)} photographs, {needed} are needed: {each} for choosing and {each} others "
                "for checking; add some" + (", or lower --frames" if each > 2 else "")
            )
        choosing, unseen = (_spread(half, frames or MOST) for half in (files[0::2], files[1::2]))
        for path in (*choosing, *unseen):
            check_file(path)
        found.append((place.name, choosing, unseen))
    return found


def _spread(files: list[Path], most: int) -> list[Path]:
    """At most this many, evenly spaced, always including the first."""
    count = min(most, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _clip(name: str, files: list[Path], model: nn.Module) -> Clip:
    preprocess: Any = model.preprocess

    @functools.cache  # every trial reads the same pixels
    def load() -> Tensor:
        return load_images(list(files), preprocess).images[None]

    return Clip(name, load, None, tuple(files))
