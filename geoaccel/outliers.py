"""Images of a scene that are unlike the others: black or blurred images, photographs of something else.

Patches of frames are matched by features of the network's own encoder (:mod:`geoaccel.frame_matches`). A frame of the
scene matches some of the others; a foreign, blurred or black one matches none better than unrelated patches do. How
well the other frames match counts too: with views far apart a frame must be stranger to be named. Bounds were chosen on
rendered scenes with planted images (`scripts/figures/bad_images.py`, `docs/reference.md`). Confidence, and agreement of
the points of a frame with the others' depth (:func:`agreement`), separated planted images from clean ones less well;
the agreement is reported next to the name.
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
"""Threshold of :func:`strangeness` above which one frame is named."""
BOUND_OF_SEVERAL = 0.066
"""The same for several frames at once, up to a quarter of the scene."""
OF_THE_REST = 0.4
"""Weight of the strangest of the rest."""
CLOSEST = 2
"""Number of other frames that a frame is judged by: its best matches."""
FEWEST = 6
"""Scenes with fewer frames are not judged."""
SIDE = 16
"""Points per side of the grid of a frame that is compared with the others."""
TOLERANCE = 0.1
"""Two depths agree if the absolute logarithm of their ratio is at most this."""


@dataclass(frozen=True)
class Outlier:
    """An image that is unlike the others.

    Attributes:
        name: Name of the image.
        frame: Its index.
        agreement: Fraction of its points, in [0, 1], that agree with the depth of the others.
        others: Median of the same over the others.
    """

    name: str
    frame: int
    agreement: float
    others: float

    def __str__(self) -> str:
        agreement, others = (f"{100 * share:.0f} %" for share in (self.agreement, self.others))
        return f"{self.name} ({agreement} of its points agree with the other images, median of those {others})"


def name_outliers(scene: AnyScene, order: Order) -> AnyScene:
    """Note the reference and the images unlike the others in the scene, and warn about these.

    Args:
        scene: The prediction, in the order of the images.
        order: The order in which the network saw them.
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
    """Suppress the warning: an earlier result of the same images has given it already."""
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
        raise UserError(f"--drop-outliers leaves {len(kept)} of {len(scene)} images; leave it out, or add images")
    notes = {**scene.notes, "outliers": [{**one, "left_out": True} for one in listed]}
    return replace(scene.of_frames(kept), notes=notes)


def unlike(
    matches: FrameMatches | None,
    bound: float = BOUND,
    bound_of_several: float = BOUND_OF_SEVERAL,
) -> list[int]:
    """The frames that are unlike the others, in order.

    Args:
        matches: Frames against frames; None if unknown: then none is named.
        bound: Threshold for one frame.
        bound_of_several: Threshold for several.
    """
    if matches is None or len(matches.ratios) < FEWEST:
        return []
    order, values = strangeness(matches)
    counts = [n for n, value in enumerate(values, 1) if value > (bound if n == 1 else bound_of_several)]
    return sorted(order[: max(counts, default=0)])


def strangeness(matches: FrameMatches) -> tuple[list[int], list[float]]:
    """How strange the strangest frame is, the two strangest, and so on, up to a quarter of the scene.

    Frames are sorted by how well they match the others. The best quarter of the matches does not count: several foreign
    photographs, or several black ones, match each other. Then the worst k frames are taken out. All frames are judged
    by their `CLOSEST` matches among those that remain. The value is that of the best-matched frame taken out, less a
    fraction of that of the worst-matched frame remaining.

    Args:
        matches: Matches of at least `FEWEST` frames.

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
    """Fraction of the points of a frame on surfaces that others see, and of points of others on surfaces that it sees.

    Uses the more confident half of a grid of points of each frame. A point counts if it falls into the other view.
    """
    depth, intrinsics, poses = scene.depth, scene.intrinsics, scene.cam_from_world
    frames, height, width = depth.shape
    rows, columns = (torch.linspace(1, side - 2, SIDE).long() for side in (height, width))
    # One frame at a time, keeping only a few of its points.
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
