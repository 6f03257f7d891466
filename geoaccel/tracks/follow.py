"""Matches from a network's own tracker, which tracks points of one image through the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.memory import planned
from geoaccel.memory_plan import MemoryPlan
from geoaccel.scene import Scene
from geoaccel.tracks.features import Features, quiet
from geoaccel.tracks.matching import EPIPOLAR_PIXELS, LEAST_INLIERS, epipolar_inliers

Follow = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""From an image and pixels in it [K, 2] to pixels in every image [S, K, 2], all in the network input, and a confidence
for each [S, K], in [0, 1]; 0 where the point is hidden."""

MOST_QUERIES = 512  # points per image
MOST_IMAGES = 8  # images whose points are tracked: each takes a forward
LEAST_SURE = 0.5
HALF = 0.5  # pixel centres of the network's tracker are at integers


def tracker_of(model: Any, images: Tensor, plan: MemoryPlan | None = None) -> Follow:
    """A tracker from a track head, with one forward of the network for each image whose points are tracked.

    Args:
        model: With a head ``track``, which takes ``query_points`` of the first image.
        images: [S, 3, H, W].
        plan: Memory plan; None: everything at once.

    Raises:
        UserError: If the network has no such head.
    """
    check_tracker(model)

    @torch.inference_mode()
    def follow(frame: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        order = [frame, *(i for i in range(len(images)) if i != frame)]
        weight = next(model.parameters())
        queries = (pixels - HALF).to(weight.device, torch.float32)
        given = images[order][None].float()
        given = given if plan is not None else given.to(weight.device)  # with a plan they are copied as needed
        with planned(model, plan):
            found = model(given, query_points=queries[None], heads=("track",))
        back = torch.tensor(order).argsort()
        sure = (found["vis"] * found["conf"])[0].float().cpu()
        return (found["track"][0].float().cpu() + HALF)[back].double(), sure[back]

    return follow


def check_tracker(model: Any) -> None:
    """Refuse a network without a track head."""
    if "track" not in model.heads:
        raise UserError(
            f"tracks='head' (--tracks head) needs a track head; this model has {', '.join(model.heads)}; use 'measure'"
        )


def followed(
    scene: Scene, features: Sequence[Features], follow: Follow
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """For pairs of images: features of the first [K], their pixels in the second [K, 2], and confidence [K].

    Those of a pair obey one epipolar geometry, as feature matches do.
    """
    count = len(scene)
    height, width = scene.depth.shape[1:]
    for i in np.unique(np.linspace(0, count - 1, min(count, MOST_IMAGES)).round().astype(int)).tolist():
        at = scene.transforms[i].pixels_to_network(torch.from_numpy(features[i].pixels))
        inside = ((at >= 0) & (at < torch.tensor([width, height]))).all(-1).nonzero()[:, 0].numpy()
        chosen = np.sort(np.random.default_rng(i).permutation(inside)[:MOST_QUERIES])
        if not len(chosen):
            continue
        places, sure = follow(i, at[chosen])
        for j in range(count):
            if i == j:
                continue
            pixels = scene.transforms[j].pixels_to_original(places[j].double()).numpy()
            seen = (sure[j] > LEAST_SURE).numpy() & np.isfinite(pixels).all(1) & (pixels >= 0).all(1)
            seen &= (pixels < scene.transforms[j].original_size[::-1]).all(1)
            own, there = chosen[seen], pixels[seen]
            limit = EPIPOLAR_PIXELS * max(features[i].scale, features[j].scale)
            with quiet():
                good, _ = epipolar_inliers(features[i].pixels[own], there, limit, LEAST_INLIERS)
            yield i, j, own[good], there[good], sure[j].numpy()[seen][good]
