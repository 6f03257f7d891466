"""A clip: the images of one forward during calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from geoaccel.quantization.calibrate.prefix import Batch


@dataclass(frozen=True)
class Clip:
    """Images of one forward.

    Attributes:
        name: Name of the scene, and the start of the clip in it.
        load: Returns images [1, S, 3, H, W], preprocessed for the model.
        truth: Returns ground-truth cameras [S, 4, 4]; None if unknown.
        files: The image files; empty if they are rendered.
    """

    name: str
    load: Batch
    truth: Callable[[], Tensor] | None = None
    files: tuple[Path, ...] = ()


def in_order(clips: Sequence[Clip]) -> list[list[str]]:
    """The clips as plain data, in order, because unfinished work counts them."""
    return [[clip.name, *map(str, clip.files)] for clip in clips]
