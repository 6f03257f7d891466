"""Matching of given names to images: leading folders and the suffix may be missing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import TypeAlias

from geoaccel.errors import UserError

Parts: TypeAlias = tuple[str, ...]


class Names:
    """A set of names for look-up.

    Two names fit if one of them is the end of the other, folder by folder, with or without the suffix:
    ``images/cam0/a.jpg`` fits ``cam0/a`` and ``a.jpg``, but not ``cam1/a.jpg``.

    Args:
        names: As paths.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._parts = [_parts(name) for name in names]
        self._whole: dict[Parts, list[int]] = defaultdict(list)
        self._ends: dict[Parts, list[int]] = defaultdict(list)
        for i, parts in enumerate(self._parts):
            for form in _forms(parts):
                self._whole[form].append(i)
                for length in range(1, len(form) + 1):
                    self._ends[form[-length:]].append(i)

    def best(self, name: str) -> list[int]:
        """Indices of the best-fitting names, several if ambiguous: by the longest common end, then the same name, then
        the same suffix."""
        parts = _parts(name)
        for length in range(len(parts), 0, -1):
            table = self._ends if length == len(parts) else self._whole
            found = dict.fromkeys(i for form in _forms(parts) for i in table.get(form[-length:], ()))
            if found:
                closest = max(_closeness(parts, self._parts[i]) for i in found)
                return [i for i in found if _closeness(parts, self._parts[i]) == closest]
        return []


def paired(known: Sequence[str], names: Sequence[str], source: object) -> list[int | None]:
    """The index of the name in a file for each image: the mutually best fits.

    If none fits, because folders were renamed, file names decide, if all of them differ.

    Args:
        known: Names in the file.
        names: Of the images.
        source: The file, for the error.

    Raises:
        ValueError: If a name fits several images, or an image several names.
    """
    there, images = Names(known), Names(names)
    meant = [set(images.best(name)) for name in known]
    found: list[int | None] = []
    image_of: dict[int, str] = {}
    for i, name in enumerate(names):
        fits = [entry for entry in there.best(name) if i in meant[entry]]
        if len(fits) > 1:
            raise UserError(
                f"image {name} may be {known[fits[0]]} or {known[fits[1]]} of {source}; remove other images from the "
                "file, or give the folder that contains all of them with --recursive, so that names have folders"
            )
        if fits and (other := image_of.setdefault(fits[0], name)) != name:
            raise UserError(
                f"{known[fits[0]]} of {source} may be image {other} or {name}; use the same names in the file"
            )
        found.append(fits[0] if fits else None)
    return found if any(entry is not None for entry in found) else _by_file_names(known, names)


def _by_file_names(known: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Match by file names alone, if no folder agrees (photographs that were moved) and all file names differ."""
    there, here = ([PurePath(name).name for name in all_of] for all_of in (known, names))
    if len(set(there)) < len(there) or len(set(here)) < len(here):
        return [None] * len(names)
    number = {name: i for i, name in enumerate(there)}
    return [number.get(name) for name in here]


def _parts(name: str) -> Parts:
    """Parts of a path, without what lies above the current folder."""
    return tuple(part for part in PurePath(os.path.normpath(name)).parts if part != os.pardir)


def _forms(parts: Parts) -> list[Parts]:
    """The parts with and without the suffix."""
    return list(dict.fromkeys([parts, (*parts[:-1], PurePath(parts[-1]).stem)])) if parts else []


def _closeness(one: Parts, other: Parts) -> int:
    """Closeness of two names that fit each other."""
    if one == other:
        return 3
    last, its = one[-1], other[-1]
    return 2 if last == its else int(last == PurePath(its).stem or its == PurePath(last).stem)
