"""Which images of a scene disagree with the others: black ones, blurred ones, photographs of something else.

A frame is judged against the other frames of its scene by three numbers, each relative to their median:

``alike``        how far its patches are from those of the other frames, as the network's encoder sees them
                 (:func:`geoaccel.reference.likeness`)
``agreement``    the share of its points that lie where other frames see a surface, and of theirs that do so in it, of
                 those that fall into view
``confidence``   of its pixels, as the network says

A weighted sum of them is its score. Weights and threshold were fitted by `scripts/figures/bad_images.py` on rendered
scenes (`geoaccel.agreement.FITTED` says on which), with a planted black, blurred or foreign image.
"""

from __future__ import annotations

import logging
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

SIDE = 16
"""Points of a frame, each way, that are looked at from the others."""
TOLERANCE = 0.1
"""Two depths agree if the logarithm of their ratio is no more than this."""
FEWEST = 4
"""Frames of a scene below which nothing can be said of one of them."""


@dataclass(frozen=True)
class Rule:
    """How the three numbers make a score; above 0 a frame is named.

    Attributes:
        alike, agreement, confidence: Weights.
        bias: Added.
    """

    alike: float
    agreement: float
    confidence: float
    bias: float


FITTED = Rule(alike=0.0, agreement=0.0, confidence=0.0, bias=-1.0)


@dataclass(frozen=True)
class Outlier:
    """An image that disagrees with the others.

    Attributes:
        name: Of the image.
        frame: Its number.
        score: Above 0; how far.
        reason: Which of the numbers said so, in words.
    """

    name: str
    frame: int
    score: float
    reason: str


def name_outliers(scene: AnyScene, order: Order, *, drop: bool = False) -> AnyScene:
    """The scene with a note of its reference and of images that disagree with the others, which a warning names.

    Args:
        scene: What was predicted, in the order of the images.
        order: In which the network saw them.
        drop: Leave those images out.

    Raises:
        UserError: If fewer than two would be left.
    """
    found = outliers(scene, order.alike)
    listed = [{"image": one.name, "why": one.reason, "score": round(one.score, 2)} for one in found]
    notes = {"reference": scene.names[order.first], "outliers": listed}
    scene = replace(scene, notes={**scene.notes, **notes, **({"left_out": drop} if found else {})})
    if not found:
        return scene
    named = ", ".join(f"{one.name} ({one.reason})" for one in found)
    advice = "; left out" if drop else "; leave them out with --drop-outliers (drop_outliers=True)"
    if order.first in [one.frame for one in found]:
        advice += "; one of them is the reference frame: choose another one with --reference auto (reference='auto')"
    logger.warning("%d of %d images disagree with the others: %s%s", len(found), len(scene), named, advice)
    kept = [frame for frame in range(len(scene)) if frame not in {one.frame for one in found}]
    if drop and len(kept) < 2:
        raise UserError(f"--drop-outliers leaves {len(kept)} of {len(scene)} images; do without it, or add images")
    return scene.of_frames(kept) if drop else scene


def outliers(
    scene: Scene,
    alike: Tensor | None,  # [S]
    rule: Rule = FITTED,
) -> list[Outlier]:
    """The images that disagree with the others, in their order.

    Args:
        scene: What was predicted.
        alike: Of :func:`geoaccel.reference.likeness`; None where that is not known, and nothing is named.
        rule: Weights.
    """
    if len(scene) < FEWEST or alike is None:
        return []
    numbers = measured(scene, alike)
    score = numbers @ torch.tensor([rule.alike, rule.agreement, rule.confidence]) + rule.bias
    reasons = (
        "it looks unlike the others",
        "its depth does not agree with theirs",
        "the model is much less sure of it",
    )
    parts = numbers * torch.tensor([rule.alike, rule.agreement, rule.confidence])
    return [
        Outlier(scene.names[i], i, float(score[i]), reasons[int(parts[i].argmax())])
        for i in (score > 0).nonzero()[:, 0].tolist()
    ]


def measured(scene: Scene, alike: Tensor) -> Tensor:  # [S, 3]
    """``alike``, ``agreement`` and ``confidence`` of every frame, relative to the median of the others."""
    away = (1 - alike.float()).clamp(min=1e-4).log()
    sure = torch.stack([c[m].median() if m.any() else c.min() for c, m in zip(scene.conf, scene.mask, strict=True)])
    columns = (away, agreement(scene), sure.clamp(min=1e-6).log())
    return torch.stack([_beyond_the_others(column) for column in columns], dim=1)


def _beyond_the_others(
    x: Tensor,  # [S]
) -> Tensor:  # [S]
    """Each number less the median of the others."""
    return torch.stack([x[i] - torch.cat([x[:i], x[i + 1 :]]).median() for i in range(len(x))])


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
