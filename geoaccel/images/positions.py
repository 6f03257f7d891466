"""Known positions of cameras: tables of x, y, z or of GPS, and camera files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.images.documents import matched, read_document
from geoaccel.images.given import read_poses

METRES, AS_GIVEN = "metre", "that of the given positions"
ROUNDED = 1e-3
"""Fraction of the extent of positions that may be lost to float32 rounding."""
_GPS = {"lat": 0, "latitude": 0, "lon": 1, "lng": 1, "longitude": 1, "alt": 2, "altitude": 2, "height": 2}
_AXES = {"x": 0, "y": 1, "z": 2}
_EARTH_RADIUS, _FLATTENING_SQUARED = 6_378_137.0, 6.694379990141e-3  # of WGS 84, in metres


@dataclass(frozen=True)
class Positions:
    """Positions of cameras in the user's world frame.

    Attributes:
        places: [S, 3], float64; for GPS metres east, north and up from the first one. NaN if unknown.
        unit: Name of the unit.
    """

    places: Tensor
    unit: str


def read_positions(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The position [3] of each image named in a file, and the unit.

    Args:
        path: A table with a line ``name x y z`` for each image, separated by blanks, tabs, commas or semicolons. A
            header line may name the columns: ``name,x,y,z`` in any order, or ``name,latitude,longitude,altitude`` in
            degrees and metres, which become metres east, north and up from the first one. Lines with ``#`` are ignored.
            Or a ``transforms.json`` or ``poses.json`` with the cameras.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it contains something else, or fewer than three positions.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".json":
        poses = read_poses(read_document(path))
        found, unit = {name: invert_rigid(pose)[:3, 3] for name, pose in poses.items()}, AS_GIVEN
    else:
        found, unit = _read_table(path)
    bad = next((name for name, place in found.items() if not place.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path} gives {bad} a position that is NaN or infinite; remove this line")
    if len(found) < 3:
        raise UserError(f"{path} has {len(found)} positions; give at least three")
    return found, unit


def match_positions(path: str | Path, names: Sequence[str]) -> Positions:
    """The positions of the images from a file of :func:`read_positions`.

    Raises:
        FileNotFoundError, ValueError: As there, or if fewer than three of the images have one.
    """
    values, unit = read_positions(path)
    found = matched(values, names, path)
    known = sum(place is not None for place in found)
    if known < 3:
        raise UserError(f"{path} has positions of {known} of the images; give at least three")
    nowhere = torch.full((3,), math.nan, dtype=torch.float64)
    places = torch.stack([nowhere if place is None else place for place in found])
    _check_near(places[places.isfinite().all(-1)], path)
    return Positions(places, unit)


def _check_near(places: Tensor, path: str | Path) -> None:
    """Refuse positions that coincide, or too far from the origin: reconstructions are in float32."""
    if bool((places == places[0]).all()):
        raise UserError(
            f"{path} gives all images the same position, which determines no similarity; give distinct ones"
        )
    largest, extent = float(places.abs().max()), float((places - places.mean(0)).norm(dim=-1).max())
    if extent > 0 and torch.finfo(torch.float32).eps * largest > ROUNDED * extent:
        raise UserError(
            f"{path} has positions {largest:.3g} from the origin and {extent:.3g} from each other, which float32 "
            "cannot resolve; subtract the same offset from all of them first"
        )


def _read_table(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of positions with lines: name x y z")
    lines = enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), start=1)
    rows = [(number, _cells(line)) for number, line in lines if line.strip() and line.strip()[0] != "#"]
    order, of_gps = _columns(rows[0][1]) if rows else ((0, 1, 2, 3), False)
    if order is not None:
        rows = rows[1:]
    name, *axes = order or (0, 1, 2, 3)
    found: dict[str, Tensor] = {}
    for number, cells in rows:
        try:
            place = torch.tensor([float(cells[axis]) for axis in axes], dtype=torch.float64)
            earlier = found.setdefault(cells[name], place)
        except (ValueError, IndexError):
            raise UserError(
                f"line {number} of {path} is {','.join(cells)!r}; expected: name x y z, with numbers"
            ) from None
        if not torch.equal(earlier, place) and not place.isnan().any():
            raise UserError(f"{path} gives {cells[name]} two positions; remove one of these lines")
    return (_east_north_up(found, path), METRES) if of_gps else (found, AS_GIVEN)


def _cells(line: str) -> list[str]:
    """Cells of one line, split at its separator; names with blanks need a separator other than blanks."""
    mark = next((mark for mark in ("\t", ";", ",") if mark in line), None)
    cells = line.split() if mark is None else next(csv.reader([line], delimiter=mark))
    return [cell.strip() for cell in cells]


def _columns(first: Sequence[str]) -> tuple[tuple[int, ...] | None, bool]:
    """Columns of name and axes, if the first line is a header, and whether they are GPS."""
    titles = [title.casefold() for title in first]
    for known, of_gps in ((_AXES, False), (_GPS, True)):
        places = {known[title]: i for i, title in enumerate(titles) if title in known}
        if len(places) == 3:
            others = [i for i, title in enumerate(titles) if title not in known]
            if not others:
                return None, False
            named = next((i for i in others if titles[i] in ("name", "image", "file", "filename")), others[0])
            return (named, places[0], places[1], places[2]), of_gps
    return None, False


def _east_north_up(
    found: Mapping[str, Tensor],  # latitude and longitude in degrees, altitude in metres
    path: Path,
) -> dict[str, Tensor]:
    """Metres from the first one, in the tangent plane of the WGS 84 ellipsoid there."""
    for name, place in found.items():
        if abs(float(place[0])) > 90 or abs(float(place[1])) > 180:
            raise UserError(
                f"{path} has {name} at latitude {float(place[0]):g} and longitude {float(place[1]):g}; they must be "
                "within 90 and 180 degrees"
            )
    if not found:
        return {}
    origin = next(iter(found.values()))
    latitude, longitude = torch.deg2rad(origin[:2]).tolist()
    sin, cos = math.sin, math.cos
    axes = torch.tensor(
        [
            [-sin(longitude), cos(longitude), 0.0],
            [-sin(latitude) * cos(longitude), -sin(latitude) * sin(longitude), cos(latitude)],
            [cos(latitude) * cos(longitude), cos(latitude) * sin(longitude), sin(latitude)],
        ],
        dtype=torch.float64,
    )
    start = _from_centre_of_earth(origin)
    return {name: axes @ (_from_centre_of_earth(place) - start) for name, place in found.items()}


def _from_centre_of_earth(place: Tensor) -> Tensor:  # [3], metres
    latitude, longitude = torch.deg2rad(place[:2]).tolist()
    across = _EARTH_RADIUS / math.sqrt(1 - _FLATTENING_SQUARED * math.sin(latitude) ** 2)
    height = float(place[2])
    ring = (across + height) * math.cos(latitude)
    up = (across * (1 - _FLATTENING_SQUARED) + height) * math.sin(latitude)
    return torch.tensor([ring * math.cos(longitude), ring * math.sin(longitude), up], dtype=torch.float64)
