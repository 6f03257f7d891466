"""Patch matching: the surface around a feature, warped into another image by the predicted geometry.

Descriptors of local features stop matching when the view rotates by some 30 degrees. Predicted depth and cameras tell
how the surface around a feature looks from elsewhere, up to an offset, and the offset is measured: coarsely within the
whole search radius, then around the consensus of the pair, then with subpixel accuracy and a forward-backward check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.cameras import pixel_grid
from geoaccel.scene import Scene
from geoaccel.tracks.features import Features
from geoaccel.tracks.matching import EPIPOLAR_PIXELS, LEAST_INLIERS, epipolar_inliers
from geoaccel.tracks.predicted import lift, see

COARSE, FINE = 6, 8  # half sides of templates, in samples
LEAST_COARSE, LEAST_FINE = 0.5, 0.75  # correlation
RETURNS = 1.0  # forward-backward error, in pixels of the image that features were detected in
LEAST_TEXTURE = 1.0  # grey levels
MOST_ANCHORS = 512
LEAST_AGREEING = 8
MOST_STRETCH = 3.0


@dataclass(frozen=True, eq=False)
class Shifted:
    """Features of image i in image j.

    Attributes:
        anchor: Indices of features of image i [K].
        pixels: Their positions in image j [K, 2], original image.
        likeness: Correlation of the patches [K].
    """

    anchor: np.ndarray
    pixels: np.ndarray
    likeness: np.ndarray


def shifted(scene: Scene, features: Sequence[Features], i: int, j: int, radius: float) -> Shifted:
    """Find the features of one image in another.

    Args:
        scene: Predicts their positions.
        features: Features of all images.
        i: The first image.
        j: The second.
        radius: Search radius, in original pixels of image j.
    """
    here, there = features[i], features[j]
    anchor, at, shape = _surfaces(scene, here, i, j)
    step = 2 * here.scale
    source = here.pixels[anchor]
    off, likeness = _align(here, there, (source, at, shape), step, COARSE, math.ceil(radius / step))
    sure = likeness > LEAST_COARSE
    if sure.sum() < LEAST_AGREEING:
        return Shifted(anchor[:0], at[:0], np.zeros(0))
    middle = np.median(off[sure], axis=0)
    away = np.abs(off - middle).max(-1)
    near = sure & (away < max(3 * step, 4 * float(np.median(away[sure]))))
    anchor, source, shape, moved = anchor[near], source[near], shape[near], at[near] + off[near]
    off, likeness = _align(here, there, (source, moved, shape), here.scale, FINE, 3)
    moved = moved + off
    back, _ = _align(there, here, (moved, source, np.linalg.inv(shape)), here.scale, FINE, 3)
    good = (likeness > LEAST_FINE) & (np.linalg.norm(back, axis=-1) < RETURNS * here.scale)
    # Only pairs with many matches can be verified this way; others are verified by points with three views.
    if good.sum() >= LEAST_INLIERS:
        limit = EPIPOLAR_PIXELS * max(here.scale, there.scale)
        good[good], _ = epipolar_inliers(source[good], moved[good], limit, LEAST_INLIERS)
    return Shifted(anchor[good], moved[good], likeness[good])


def _surfaces(
    scene: Scene, here: Features, i: int, j: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [K], [K, 2], [K, 2, 2]
    """Features of image i on a smooth surface visible in image j, their predicted positions, and local affine warps."""
    anchor = np.arange(len(here.pixels))[:MOST_ANCHORS]
    at, shape = _predict(scene, i, j, here.pixels[anchor], here.scale)
    known = np.isfinite(at).all(-1) & np.isfinite(shape).all((1, 2))
    stretch = np.linalg.svd(np.where(known[:, None, None], shape, 0.0), compute_uv=False)
    usable = known & (stretch.max(-1) < MOST_STRETCH) & (stretch.min(-1) > 1 / MOST_STRETCH)
    return anchor[usable], at[usable], shape[usable]


def _predict(
    scene: Scene,
    i: int,
    j: int,
    pixels: np.ndarray,  # [K, 2]
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:  # [K, 2], [K, 2, 2]; NaN where unknown
    """Predicted positions in image j of pixels of image i, and local affine warps."""
    grid = (pixel_grid(5, 5).numpy().reshape(-1, 2) - 2.5) * 3 * scale
    around = (pixels[:, None] + grid).reshape(-1, 2)
    seen = see(scene, j, lift(scene, i, around))
    target = np.where(seen.likely[:, None], seen.pixels, np.nan).reshape(len(pixels), len(grid), 2)
    middle = target.mean(axis=1)
    shape = np.einsum("kna,nb->kab", target - middle[:, None], grid) / (grid[:, 0] ** 2).sum()
    rest = target - middle[:, None] - np.einsum("kab,nb->kna", shape, grid)
    flat = np.sqrt((rest**2).sum(-1).mean(-1)) < 2 * scale
    return np.where(flat[:, None], middle, np.nan), shape


def _align(
    here: Features,
    there: Features,
    patches: tuple[
        np.ndarray, np.ndarray, np.ndarray
    ],  # here [K, 2], there [K, 2], pixels there for one here [K, 2, 2]
    step: float,  # pixels here between samples
    half: int,  # side of the template, in samples
    reach: int,  # of the search, in samples
) -> tuple[np.ndarray, np.ndarray]:  # [K, 2], [K]
    """The offset in the other image with the highest patch correlation, and that correlation."""
    source, target, shape = patches
    if not len(source):
        return target, np.zeros(0)
    template = _read(here, source, np.broadcast_to(np.eye(2), shape.shape), step, half)
    window = _read(there, target, shape, step, half + reach)
    side = 2 * half + 1
    texture = template.std(dim=(1, 2))
    template = template - template.mean(dim=(1, 2), keepdim=True)
    template = template / template.norm(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    products = F.conv2d(window[None], template[:, None], groups=len(template))[0]
    centred = window - window.mean(dim=(1, 2), keepdim=True)
    mean = F.avg_pool2d(centred[None], side, stride=1)[0]
    power = (F.avg_pool2d(centred.square()[None], side, stride=1)[0] - mean.square()).clamp(min=0) * side**2
    enough = (power > (LEAST_TEXTURE * side) ** 2) & (texture > LEAST_TEXTURE)[:, None, None]
    likeness = (products / power.sqrt().clamp(min=1e-6)).where(enough, -1.0)
    best, place = likeness.flatten(1).max(dim=1)
    width = 2 * reach + 1
    row, column = place // width, place % width
    sub = _peak(likeness, row, column)
    inside = (row > 0) & (column > 0) & (row < width - 1) & (column < width - 1)
    grid = (torch.stack([column, row], dim=-1) - reach + sub).double().numpy() * step
    return np.einsum("kab,kb->ka", shape, grid), best.where(inside, -1.0).numpy()


def _peak(likeness: Tensor, row: Tensor, column: Tensor) -> Tensor:  # [K, 2] in (-0.5, 0.5)
    """Subpixel maximum of the parabola through a maximum and its neighbours, in x and y."""
    index = torch.arange(len(likeness))
    last = likeness.shape[-1] - 1
    row, column = row.clamp(1, last - 1), column.clamp(1, last - 1)
    middle = likeness[index, row, column]
    parts = []
    for dy, dx in ((0, 1), (1, 0)):
        before, after = likeness[index, row - dy, column - dx], likeness[index, row + dy, column + dx]
        bend = 2 * middle - before - after
        parts.append(((after - before) / (2 * bend.clamp(min=1e-6))).clamp(-0.5, 0.5))
    return torch.stack(parts, dim=-1)


def _read(
    features: Features,
    centre: np.ndarray,  # [K, 2]
    shape: np.ndarray,  # [K, 2, 2]
    step: float,
    half: int,
) -> Tensor:  # [K, side, side], grey levels
    """Square patches of an image, sampled along sheared axes."""
    side = 2 * half + 1
    grid = (pixel_grid(side, side).numpy().reshape(-1, 2) - side / 2) * step
    at = centre[:, None] + np.einsum("kab,nb->kna", shape, grid)
    height, width = features.picture.shape
    # grid_sample without align_corners uses the package's pixel convention.
    at = at / features.scale * (2 / width, 2 / height) - 1
    picture = torch.from_numpy(features.picture)[None, None].float()
    values = F.grid_sample(picture, torch.from_numpy(at).float()[None], align_corners=False, padding_mode="border")
    return values[0, 0].view(-1, side, side)
