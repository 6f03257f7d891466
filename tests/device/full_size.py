"""One forward of a network of full size in bfloat16, on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from simulated_cuda import SimulatedCuda

import geoaccel
from geoaccel.models import build
from geoaccel.precision import cast

SIZE = (392, 518)
HEADS = {"vggt": ("camera", "depth", "point"), "pi3": ("point", "conf", "camera")}
OUTLIERS = 0.1


@dataclass(frozen=True)
class FullSize:
    """What a forward took.

    Attributes:
        launches, waits: Of the forward.
        peak: Bytes that were alive at most, weights and images with them.
        weights: Bytes of the weights.
    """

    launches: int
    waits: int
    peak: int
    weights: int

    def __str__(self) -> str:
        gib = (self.peak / 2**30, self.weights / 2**30)
        return f"{self.launches} launches, {self.waits} waits, {gib[0]:.2f} GiB with {gib[1]:.2f} of weights"


def full_size(backbone: str, method: Any, frames: int, *, forwards: int = 1, **options: Any) -> FullSize:
    """The last of some forwards over frames of ``SIZE``; only the first makes what is kept.

    Args:
        backbone: With the sizes of the published checkpoint.
        method: As ``merging`` of :func:`geoaccel.accelerate`.
        frames: Of one scene.
        forwards: How many.
        options: Of the forward.
    """
    outliers = int(OUTLIERS * frames * (SIZE[0] * SIZE[1] / 14**2 + 5))
    answers = {
        "encoder.py _check_finite": 1.0,
        "headwise.py split_outliers": lambda of_heads: [outliers] * of_heads.numel(),
    }
    with torch.device("meta"):
        model = cast(build(backbone), torch.bfloat16)
    with SimulatedCuda(shapes_only=True, answers=answers) as cuda, torch.no_grad():
        model = geoaccel.accelerate(model.to_empty(device="cuda:0").eval(), merging=method)
        weights = cuda.alive
        images = torch.empty(1, frames, 3, *SIZE, device="cuda:0")
        for _ in range(forwards):
            cuda.reset()
            model(images, **{"heads": HEADS[backbone], **options})
        return FullSize(sum(cuda.launches.values()), sum(cuda.waits.values()), cuda.peak, weights)
