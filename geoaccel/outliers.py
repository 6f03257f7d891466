"""Images of a scene that are unlike the others: black ones, blurred ones, photographs of something else.

How much a frame is like the others is what the network's own encoder says (:func:`geoaccel.reference.likeness`), and
the frames of a scene form a crowd: those that are parted from it by a jump are named, one by a small jump, several by a
large one. The jumps were chosen on rendered scenes with a planted black, blurred or foreign image
(`scripts/figures/bad_images.py`, `docs/reference.md`). On the same scenes confidence, and how well the points of a
frame agree with the others' depth (:func:`agreement`), told planted images from clean ones less well, and together with
likeness not better than likeness alone; the agreement is said beside the name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.reference import Order
from geoaccel.scene import Scene

logger = logging.getLogger(__name__)

AnyScene = TypeVar("AnyScene", bound=Scene)

JUMP = 0.038
"""Of the logarithm of 1 - likeness, from the least alike frame to the next: above it that frame is named."""
JUMP_OF_MANY = 0.15
"""From several frames, up to a quarter of the scene, to the rest. Views from far around jump as well, by less."""
FEWEST = 6
"""Frames of a scene below which nothing is said of one of them."""
SIDE = 16
"""Points of a frame, each way, that are looked at from the others."""
TOLERANCE = 0.1
"""Two depths agree if the logarithm of their ratio is no more than this."""


@dataclass(frozen=True)
class Outlier:
    """An image that is unlike the others.

    Attributes:
        name: Of the image.
        frame: Its number.
        agreement: Share of its points, in [0, 1], that agree with the depth of the others.
        others: The same of the others, their median.
    """

    name: str
    frame: int
    agreement: float
    others: float

    def __str__(self) -> str:
        agreement, others = (f"{100 * share:.0f} %" for share in (self.agreement, self.others))
        return f"{self.name} ({agreement} of its points agree with the others, {others} of theirs)"


def name_outliers(scene: AnyScene, order: Order) -> AnyScene:
    """The scene with a note of its reference and of images that are unlike the others, which a warning names.

    Args:
        scene: What was predicted, in the order of the images.
        order: In which the network saw them.
    """
    frames = unlike(order.alike)
    agreeing = agreement(scene) if frames else torch.zeros(len(scene))
    rest = agreeing[[frame for frame in range(len(scene)) if frame not in frames]]
    found = [Outlier(scene.names[f], f, float(agreeing[f]), float(rest.median())) for f in frames]
    listed = [{"image": one.name, "agreement": round(one.agreement, 3), "left_out": False} for one in found]
    scene = replace(scene, notes={**scene.notes, "reference": scene.names[order.first], "outliers": listed})
    if not found:
        return scene
    advice = "--drop-outliers (drop_outliers=True) leaves them out"
    if order.first in frames:
        advice += "; the reference frame is among them: choose another one with --reference auto (reference='auto')"
    named = ", ".join(map(str, found))
    logger.warning("%d of %d images are unlike the others: %s; %s", len(found), len(scene), named, advice)
    return scene


@contextmanager
def warned() -> Iterator[None]:
    """An earlier result of the same images has said already which are unlike the others."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def without_outliers(scene: AnyScene) -> AnyScene:
    """The scene without the images that :func:`name_outliers` has named.

    Raises:
        UserError: If fewer than two would be left.
    """
    listed = scene.notes.get("outliers", [])
    if not listed:
        return scene
    named = {one["image"] for one in listed}
    kept = [frame for frame, name in enumerate(scene.names) if name not in named]
    if len(kept) < 2:
        raise UserError(f"--drop-outliers leaves {len(kept)} of {len(scene)} images; do without it, or add images")
    notes = {**scene.notes, "outliers": [{**one, "left_out": True} for one in listed]}
    return replace(scene.of_frames(kept), notes=notes)


def unlike(
    alike: Tensor | Sequence[float] | None,  # [S]
    jump: float = JUMP,
    jump_of_many: float = JUMP_OF_MANY,
) -> list[int]:
    """The frames that are parted from the others, in their order.

    Args:
        alike: Likeness of every frame; None where it is not known, and nothing is named.
        jump: For one frame.
        jump_of_many: For several.
    """
    if alike is None or len(alike) < FEWEST:
        return []
    away, order = (1 - torch.as_tensor(alike)).clamp(min=1e-4).log().sort(descending=True)
    jumps = (away[:-1] - away[1:]).tolist()[: len(away) // 4]
    counts = [n for n, size in enumerate(jumps, 1) if size > (jump if n == 1 else jump_of_many)]
    return sorted(order[: max(counts, default=0)].tolist())


def agreement(scene: Scene) -> Tensor:  # [S], in [0, 1]
    """How many points of a frame lie on surfaces that others see, and of others on those that it sees.

    Of each frame the surer half of a grid of points is looked at. A point counts where it falls into the other view.
    """
    depth, intrinsics, poses = scene.depth, scene.intrinsics, scene.cam_from_world
    frames, height, width = depth.shape
    rows, columns = (torch.linspace(1, side - 2, SIDE).long() for side in (height, width))
    points = unproject_depth(depth, intrinsics, poses)[:, rows][:, :, columns].reshape(frames, -1, 3)
    sure = scene.conf[:, rows][:, :, columns].reshape(frames, -1)
    used = scene.mask[:, rows][:, :, columns].reshape(frames, -1) & (sure >= sure.median(dim=1, keepdim=True).values)
    seen, agreeing = torch.zeros(frames), torch.zeros(frames)
    for other in range(frames):
        there = points @ poses[other, :3, :3].T + poses[other, :3, 3]
        z = there[..., 2]
        pixel = (there @ intrinsics[other].T)[..., :2] / z[..., None].clamp(min=1e-9)
        u, v = pixel.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, max(height, width)).floor().long().unbind(-1)
        inside = used & (z > 1e-6) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        inside[other] = False
        found = depth[other][v.clamp(0, height - 1), u.clamp(0, width - 1)]
        inside &= found > 0
        agrees = inside & ((z / found.clamp(min=1e-9)).clamp(min=1e-9).log().abs() < TOLERANCE)
        seen += inside.sum(dim=1)
        agreeing += agrees.sum(dim=1)
        seen[other] += inside.sum()
        agreeing[other] += agrees.sum()
    return agreeing / seen.clamp(min=1)
