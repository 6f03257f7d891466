"""Known intrinsics, distances and positions, applied to a predicted scene.

Cameras, depth and points change together, so that points still project exactly onto their pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from geoaccel.alignment import RobustFit, Similarity, robust_similarity
from geoaccel.cameras import invert_rigid, unproject_frames
from geoaccel.errors import UserError
from geoaccel.registry import unknown
from geoaccel.scene import Scene

if TYPE_CHECKING:
    from geoaccel.images.positions import Positions

SceneT = TypeVar("SceneT", bound=Scene)

METRE, OF_DISTANCE = "metre", "that of the given distance"
METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0, "in": 0.0254, "ft": 0.3048}
"""Units of length in metres."""
_LENGTH = re.compile(r"\s*([-+.\deE]+|nan|inf)\s*([a-zA-Z]*)\s*")


def with_intrinsics(
    scene: SceneT,
    intrinsics: Tensor,  # [S, 3, 3] in pixels of the network input
    known: Tensor | None = None,  # [S] bool; None: all
) -> SceneT:
    """The scene with given intrinsics, its points unprojected again; depth and poses stay as predicted."""
    given = intrinsics.to(scene.intrinsics)
    if known is not None:
        given = given.where(known[:, None, None], scene.intrinsics)
    points = unproject_frames(scene.depth, given, scene.cam_from_world)
    return replace(scene, intrinsics=given, points_world=points.masked_fill_(scene.depth[..., None] == 0, 0.0))


def one_camera(
    scene: SceneT,
    *,
    shared: bool = False,
    square: bool = False,
    known: Tensor | None = None,  # [S] bool
) -> SceneT:
    """The scene with one camera for all images, or with square pixels.

    Args:
        scene: With intrinsics of each image.
        shared: One camera for all images: the median of their intrinsics, or of the known ones. For portrait
            photographs width and height, and both focal lengths, are swapped.
        square: One focal length for both directions, the geometric mean; only for images without known intrinsics.
        known: Images whose intrinsics are known.

    Raises:
        ValueError: If images of different sizes would share a camera.
    """
    found = scene.original_intrinsics().double()
    given = torch.zeros(len(scene), dtype=torch.bool) if known is None else known
    if square:
        mean = (found[:, 0, 0] * found[:, 1, 1]).sqrt().where(~given, found[:, 0, 0])
        other = mean.where(~given, found[:, 1, 1])
        found[:, 0, 0], found[:, 1, 1] = mean, other
    if shared:
        found = _shared(found, scene, given)
    network = [t.intrinsics_to_network(matrix) for t, matrix in zip(scene.transforms, found, strict=True)]
    return with_intrinsics(scene, torch.stack(network))


def _shared(found: Tensor, scene: Scene, given: Tensor) -> Tensor:  # [S, 3, 3]
    """One camera for all, from those that are given, or else from all."""
    asked = given if given.any() else ~given
    sizes = [transform.original_size for transform in scene.transforms]
    other = next((size for size in sizes if sorted(size) != sorted(sizes[0])), None)
    if other is not None:
        raise UserError(
            f"images of {sizes[0][1]}x{sizes[0][0]} and of {other[1]}x{other[0]} pixels cannot share one camera; leave "
            "out shared_camera (--shared-camera), or give images of one size"
        )
    size = torch.tensor(sizes, dtype=torch.float64).flip(-1)  # width, height
    turned = torch.tensor([own != sizes[0] for own in sizes])
    focal = found[:, [0, 1], [0, 1]]
    focal = torch.where(turned[:, None], focal.flip(-1), focal)[asked].median(dim=0).values
    centre = size / 2
    for alike in (turned, ~turned):
        # It is not known which way a camera was rotated: its centre is that of images held the same way, if given.
        told = alike & (given if turned.any() else asked)
        if told.any():
            centre[alike] = found[told, :2, 2].median(dim=0).values
    shared = found.clone()
    shared[:, [0, 1], [0, 1]] = torch.where(turned[:, None], focal.flip(-1), focal)
    shared[:, :2, 2] = centre
    return shared


@dataclass(frozen=True)
class Distance:
    """A known distance between the cameras of two images.

    Attributes:
        first, second: Indices of the images.
        length: In `unit`.
        unit: Name of the unit.
    """

    first: int
    second: int
    length: float
    unit: str


def read_distance(given: str, names: Sequence[str]) -> Distance:
    """Parse ``A,B=1.25m``: names of images, with or without suffix, with folders as far as needed to be unique.

    Raises:
        ValueError: If the format is wrong, an image does not exist, or a name is ambiguous.
    """
    from geoaccel.images.names import Names  # imports Pillow

    pair, mark, length = str(given).rpartition("=")
    found = _LENGTH.fullmatch(length)
    if not mark or found is None or "," not in pair:
        raise UserError(f"scale {given!r}: give two images and the distance of their cameras, as a.jpg,b.jpg=1.25m")
    number, unit = _length(found[1], given), found[2]
    if unit and unit not in METRES:
        raise UserError(unknown("unit of length", unit, list(METRES)))
    images = Names(names)
    unclear: list[tuple[str, list[int]]] = []
    splits = [(pair[:i].strip(), pair[i + 1 :].strip()) for i, letter in enumerate(pair) if letter == ","]
    for parts in splits:  # names may contain commas
        first, second = (images.best(part) for part in parts)
        if not first or not second:
            continue
        unclear += [(part, fits) for part, fits in zip(parts, (first, second), strict=True) if len(fits) > 1]
        if len(first) > 1 or len(second) > 1:
            continue
        if first == second:
            raise UserError(f"scale {given!r} names the same image twice; give two different images")
        return Distance(first[0], second[0], number * METRES.get(unit, 1.0), METRE if unit else OF_DISTANCE)
    if unclear:
        part, fits = unclear[0]
        raise UserError(
            f"scale {given!r}: {part} is ambiguous ({names[fits[0]]}, {names[fits[1]]}); give the image with its folder"
        )
    missing = next(part for part in splits[0] if not images.best(part))
    raise UserError(unknown("image", missing, list(names) if len(names) <= 8 else [*names[:7], "..."]))


def _length(text: str, given: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise UserError(f"scale {given!r}: the distance must be a positive number")
    return number


def with_distance(scene: SceneT, distance: Distance) -> tuple[SceneT, float]:
    """The scene scaled so that two of its cameras have a known distance, and the scale factor.

    Raises:
        ValueError: If both cameras were predicted at the same position.
    """
    centres = invert_rigid(scene.cam_from_world.double())[:, :3, 3]
    apart = float((centres[distance.first] - centres[distance.second]).norm())
    across = float((centres - centres[0]).norm(dim=-1).max())
    if apart <= 1e-3 * across or apart == 0:
        names = f"{scene.names[distance.first]} and {scene.names[distance.second]}"
        raise UserError(f"the cameras of {names} were predicted at one position, which gives no scale; give two others")
    scale = distance.length / apart
    still = Similarity(torch.tensor(scale), torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return moved(scene, still, distance.unit), scale


def at_positions(scene: SceneT, positions: Positions) -> tuple[SceneT, RobustFit]:
    """The scene aligned to known positions of its cameras, and how well the known ones agree.

    Raises:
        ValueError: If they do not determine a similarity transform.
    """
    known = positions.places.isfinite().all(-1)
    centres = invert_rigid(scene.cam_from_world.double())[:, :3, 3]
    fit = robust_similarity(centres[known], positions.places[known])
    if not float(fit.similarity.scale) > 0:
        raise UserError("the given positions do not match the predicted cameras; are they of these images?")
    return moved(scene, fit.similarity, positions.unit), fit


def moved(scene: SceneT, similarity: Similarity, unit: str) -> SceneT:
    """The scene in another world frame, with depth in its unit."""
    scale = float(similarity.scale)
    depth, points = scene.depth * scale, torch.empty_like(scene.points_world)
    for own, there in zip(points, scene.points_world, strict=True):  # all of them in float64 might not fit into memory
        own.copy_(similarity.apply_points(there.flatten(0, 1)).view_as(own))
    return replace(
        scene,
        cam_from_world=similarity.apply_poses(scene.cam_from_world).to(scene.cam_from_world),
        depth=depth,
        points_world=points.masked_fill_(depth[..., None] == 0, 0.0),
        unit=unit,
    )
