"""Quantized checkpoints that were calibrated on photographs: where the photographs come from, and what is written down.

Scenes that were rendered for the purpose come from seeds that no evaluation uses. Photographs of the user's own must be
others than those that the result will be judged by; their names go into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, sample_batch
from geoaccel.images import load_images
from geoaccel.models.weights import cast
from geoaccel.quantization.awq import scale_activations
from geoaccel.quantization.method import Quantization


@dataclass(frozen=True)
class Photographs:
    """Scenes to calibrate on.

    Args:
        folders: One scene each; without any, scenes are rendered.
        scenes: How many to render.
        frames: Photographs that the model sees at a time; longer folders are split.
        first_seed: Of the rendered scenes.

    Raises:
        ValueError: If nothing is left to calibrate on, or rendered scenes would be those of an evaluation.
    """

    folders: tuple[str, ...] = ()
    scenes: int = 8
    frames: int = 8
    first_seed: int = FIRST_TRAIN_SEED

    def __post_init__(self) -> None:
        for knob in ("scenes", "frames"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob}={getattr(self, knob)} leaves nothing to calibrate on; give 1 or more")
        if not self.folders and self.first_seed < FIRST_TRAIN_SEED:
            raise ValueError(
                f"rendered scenes before {FIRST_TRAIN_SEED} are for evaluation, got first_seed={self.first_seed}"
            )

    def batches(self, model: nn.Module) -> list[Callable[[], Tensor]]:
        """Functions that each give images [1, S, 3, H, W] as the model takes them; rendering waits until then."""
        preprocess: Any = model.preprocess
        if not self.folders:
            size = (preprocess.size, preprocess.size)
            seeds = range(self.first_seed, self.first_seed + self.scenes)
            return [partial(_rendered, seed, self.frames, size) for seed in seeds]
        loaded = [load_images(folder, preprocess).images for folder in self.folders]
        return [partial(part.unsqueeze, 0) for images in loaded for part in images.split(self.frames)]

    def describe(self) -> dict[str, Any]:
        """For the file: which scenes these were."""
        if not self.folders:
            return {"rendered_seeds": [self.first_seed, self.first_seed + self.scenes - 1], "frames": self.frames}
        names = {Path(folder).name: sorted(path.name for path in Path(folder).iterdir()) for folder in self.folders}
        return {"photographs": names, "frames": self.frames}


def _rendered(seed: int, frames: int, size: tuple[int, int]) -> Tensor:
    return sample_batch([seed], frames=frames, size=size).images


def awq_on(
    photographs: Photographs,
    method: Quantization,
    *,
    patches_only: bool = True,
    progress: Callable[[Sequence[Callable[[], Tensor]]], Iterator[Callable[[], Tensor]]] = iter,
    report: Callable[[str], None] = lambda line: None,
) -> Callable[[nn.Module], dict[str, Any]]:
    """The step between opening a checkpoint and quantizing it, for ``export_quantized``.

    Args:
        photographs: What to calibrate on.
        method: What the network will be quantized with.
        patches_only: Leave camera and register tokens out of the statistics.
        progress: Goes over the batches, and shows how far it is.
        report: Called with a line of text for each layer.
    """

    def calibrate(network: nn.Module) -> dict[str, Any]:
        cast(network, torch.float32)
        images = (load() for load in progress(photographs.batches(network)))
        scalings = scale_activations(network, method, images, patches_only=patches_only, report=report)
        mean = sum(scaling.error for scaling in scalings) / len(scalings)
        return {
            "calibration": {
                "search": "awq",
                "patches_only": patches_only,
                **photographs.describe(),
                "scaled_layers": len(scalings),
                "mean_error_over_unscaled": round(mean, 4),
            }
        }

    return calibrate
