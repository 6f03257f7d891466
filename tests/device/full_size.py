"""One forward of a network of full width in bfloat16, on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from simulated_cuda import SimulatedCuda

import geoaccel
from geoaccel.memory import planned
from geoaccel.memory_plan import MemoryPlan
from geoaccel.models import build
from geoaccel.models.da3 import GIANT
from geoaccel.precision import cast

SIZE = (392, 518)
HEADS = {"vggt": ("camera", "depth", "point"), "pi3": ("point", "conf", "camera"), "da3": ("depth", "ray", "camera")}
OUTLIERS = 0.1

FEW_BLOCKS: dict[str, dict[str, Any]] = {
    "vggt": {"vit_depth": 2, "depth": 4, "dpt_layers": (0, 1, 2, 3), "heads": ("camera", "depth")},
    "pi3": {"vit_depth": 2, "decoder_depth": 4, "head_decoder_depth": 1},
    "da3": {"depth": 8, "alt_start": 2, "out_layers": (3, 5, 6, 7)},
    "da3 giant": GIANT | {"depth": 8, "alt_start": 3, "out_layers": (3, 5, 6, 7)},
}
"""Fewer blocks of the published width: as they are alike, their number changes the bytes of the weights alone."""


@dataclass(frozen=True)
class FullSize:
    """What a forward took.

    Attributes:
        launches, waits: Of the forward.
        peak: Bytes that were alive at most, weights and images with them.
        weights: Bytes of the weights.
        estimate: Bytes beside the weights, as they are predicted.
    """

    launches: int
    waits: int
    peak: int
    weights: int
    estimate: int

    @property
    def off(self) -> float:
        """Predicted over counted bytes, weights with them, less 1."""
        return (self.estimate + self.weights) / self.peak - 1

    def __str__(self) -> str:
        gib = [bytes_ / 2**30 for bytes_ in (self.peak, self.weights, self.estimate + self.weights)]
        counts = f"{self.launches} launches, {self.waits} waits"
        return f"{counts}, {gib[0]:.2f} GiB with {gib[1]:.2f} of weights, predicted {gib[2]:.2f}"


def full_size(
    backbone: str,
    method: Any,
    frames: int,
    *,
    forwards: int = 1,
    plan: Callable[[Any], MemoryPlan | None] = lambda model: None,
    config: dict[str, Any] | None = None,
    attention: str | None = None,
    **options: Any,
) -> FullSize:
    """The last of some forwards over frames of ``SIZE``; only the first makes what is kept.

    Args:
        backbone: With the sizes of the published checkpoint.
        method: As ``merging`` of :func:`geoaccel.accelerate`.
        frames: Of one scene.
        forwards: How many.
        plan: Of the model, how they keep within a limit; images are on the host then.
        config: Other sizes than the published ones.
        attention: As of :func:`geoaccel.accelerate`.
        options: Of the forward.
    """
    outliers = int(OUTLIERS * frames * (SIZE[0] * SIZE[1] / 14**2 + 5))
    answers = {
        "encoder.py _check_finite": 1.0,
        "headwise.py split_outliers": lambda of_heads: [outliers] * of_heads.numel(),
    }
    with torch.device("meta"):
        model = cast(build(backbone, **(config or {})), torch.bfloat16)
    with SimulatedCuda(shapes_only=True, answers=answers) as cuda, torch.no_grad(), ExitStack() as kept:
        model = geoaccel.accelerate(model.to_empty(device="cuda:0").eval(), merging=method, attention=attention)
        weights, chosen = cuda.alive, plan(model)
        kept.enter_context(planned(model, chosen))
        # On the host one image stands for all: nothing reads its pixels.
        images = torch.zeros(1, 1, 3, *SIZE).expand(1, frames, 3, *SIZE)
        if chosen is None:
            images = torch.empty(1, frames, 3, *SIZE, device="cuda:0")
        options = {"heads": HEADS[backbone], **options}
        for _ in range(forwards):
            cuda.reset()
            model(images, **options)
        network: Any = model
        estimate = network.activation_bytes(frames, SIZE, heads=options["heads"], plan=chosen)
        return FullSize(sum(cuda.launches.values()), sum(cuda.waits.values()), cuda.peak, weights, estimate)
