"""Images of a scene that are unlike the others: black ones, blurred ones, photographs of something else.

How well patches of two frames find a match in each other is what the network's own encoder says
(:mod:`geoaccel.frame_matches`). A frame of a scene is found in some of the others; a foreign, blurred or black one in
none better than patches are that have nothing to do with each other. How well the rest is found counts too: where views
are far from each other a frame must be stranger to be named. Bounds were chosen on rendered scenes with planted images
(`scripts/figures/bad_images.py`, `docs/reference.md`). Confidence, and how well the points of a frame agree with the
others' depth (:func:`agreement`), told planted images from clean ones less well; the agreement is said beside the name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.frame_matches import FrameMatches
from geoaccel.reference import Order
from geoaccel.scene import Scene

logger = logging.getLogger(__name__)

AnyScene = TypeVar("AnyScene", bound=Scene)

BOUND = -0.097
"""Of :func:`strangeness`, above it one frame is named."""
BOUND_OF_SEVERAL = 0.066
"""The same for several frames at once, up to a quarter of the scene."""
OF_THE_REST = 0.4
"""How much the strangest of the rest counts."""
CLOSEST = 2
"""Other frames that a frame is judged by: those in which it is found best."""
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
    frames = unlike(order.matches)
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
    matches: FrameMatches | None,
    bound: float = BOUND,
    bound_of_several: float = BOUND_OF_SEVERAL,
) -> list[int]:
    """The frames that are unlike the others, in their order.

    Args:
        matches: Frames against frames; None where that is not known, and nothing is named.
        bound: For one frame.
        bound_of_several: For several.
    """
    if matches is None or len(matches.ratios) < FEWEST:
        return []
    order, values = strangeness(matches)
    counts = [n for n, value in enumerate(values, 1) if value > (bound if n == 1 else bound_of_several)]
    return sorted(order[: max(counts, default=0)])


def strangeness(matches: FrameMatches) -> tuple[list[int], list[float]]:
    """How strange the strangest frame is, the two strangest, and so on, up to a quarter of the scene.

    Frames are put in order by how well they are found in the others. The best quarter of these does not count: several
    photographs of something else, or several black ones, are found in each other. Then so many frames are taken out.
    Each is judged by the `CLOSEST` of those that remain, as are these. The value is that of the one taken out that is
    found best, less a share of that of the one remaining that is found worst.

    Args:
        matches: Of `FEWEST` frames or more.

    Returns:
        The frames, the strangest first, and a value for each number of them.
    """
    frames, others = len(matches.ratios), matches.others
    itself = torch.arange(frames)[:, None] == others
    ratios = matches.ratios.masked_fill(itself, float("inf"))
    quarter = len(others) // 4
    found = ratios.sort(dim=1).values[:, quarter - 1 : quarter + 1].mean(dim=1)
    order = found.argsort(descending=True)
    values = []
    for count in range(1, frames // 4 + 1):
        out, rest = order[:count], order[count:]
        remaining = ratios[:, ~torch.isin(others, out)]
        if remaining.shape[1] <= CLOSEST:
            break
        closest = remaining.topk(CLOSEST, dim=1, largest=False).values.mean(dim=1)
        values.append(float(closest[out].min() - OF_THE_REST * closest[rest].max()))
    return order.tolist(), values


def agreement(scene: Scene) -> Tensor:  # [S], in [0, 1]
    """How many points of a frame lie on surfaces that others see, and of others on those that it sees.

    Of each frame the surer half of a grid of points is looked at. A point counts where it falls into the other view.
    """
    depth, intrinsics, poses = scene.depth, scene.intrinsics, scene.cam_from_world
    frames, height, width = depth.shape
    rows, columns = (torch.linspace(1, side - 2, SIDE).long() for side in (height, width))
    # Of one frame at a time: a few of its points are kept.
    pixels = zip(depth, intrinsics, poses, strict=True)
    points = torch.stack([unproject_depth(*one)[rows][:, columns].reshape(-1, 3) for one in pixels])
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
