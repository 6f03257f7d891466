"""A clip: the images that calibration shows a network at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from geoaccel.quantization.calibrate.prefix import Batch


@dataclass(frozen=True)
class Clip:
    """Images that the model sees at a time.

    Attributes:
        name: Of the scene, and where in it the clip begins.
        load: Gives images [1, S, 3, H, W] as the model takes them.
        truth: Gives the true cameras [S, 4, 4]; None where they are not known.
        files: The image files; empty where they are rendered.
    """

    name: str
    load: Batch
    truth: Callable[[], Tensor] | None = None
    files: tuple[Path, ...] = ()


def in_order(clips: Sequence[Clip]) -> list[list[str]]:
    """The clips as plain data, in order: unfinished work counts them."""
    return [[clip.name, *map(str, clip.files)] for clip in clips]
