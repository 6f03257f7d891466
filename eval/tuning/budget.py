"""Limits on a plan's loss of accuracy, and the required speedup and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from geoaccel.errors import UserError
from geoaccel.memory import read_size

ERRORS = {"pose_deg": "deg", "depth_rel": "%"}
"""Errors that can be limited, and their units."""

UNLIMITED = {"pose_deg": 1.0, "depth_rel": 0.01}
"""Equal weights if no error is limited: one degree of the cameras and one percent of the depth."""


@dataclass(frozen=True)
class Budget:
    """The requested limits; None if not given.

    Attributes:
        pose_deg: Largest error of the cameras against the dense model, in degrees.
        depth_rel: Largest relative error of the depth against the dense model.
        speedup: Dense over accelerated time, at least.
        memory_bytes: Weights and activations together, at most.

    Raises:
        ValueError: If none was given, or numbers are invalid or contradictory.
    """

    pose_deg: float | None = None
    depth_rel: float | None = None
    speedup: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in vars(self).values()):
            raise UserError(
                "no budget was given; give --max-pose-error, --max-depth-error, --speedup or --max-memory, or several"
            )
        for name, option in (("pose_deg", "--max-pose-error"), ("depth_rel", "--max-depth-error")):
            if getattr(self, name) == 0:
                raise UserError(f"{option} 0 leaves every layer dense, for which no plan is needed; give more")
        if self.speedup is not None and self.speedup <= 1:
            raise UserError(f"--speedup {self.speedup:g} is no faster than the dense model; give more than 1")
        if self.memory_bytes == 0:
            raise UserError("--max-memory 0 holds no network; give more")

    @classmethod
    def read(cls, *, pose: str | None, depth: str | None, speedup: str | None, memory: str | None) -> Budget:
        """From command-line values: ``0.5deg``, ``1%``, ``4``, ``16GB``.

        Raises:
            ValueError: For invalid values, or as the class.
        """
        return cls(
            pose_deg=_number("--max-pose-error", pose, {"": 1.0, "deg": 1.0}, "0.5deg"),
            depth_rel=_number("--max-depth-error", depth, {"%": 0.01}, "1%"),
            speedup=_number("--speedup", speedup, {"": 1.0, "x": 1.0}, "4"),
            memory_bytes=None if memory is None else read_size(memory, "--max-memory"),
        )

    @property
    def limits(self) -> dict[str, float]:
        """The limited errors; those of :data:`UNLIMITED` if none is."""
        given = {name: value for name in ERRORS if (value := getattr(self, name)) is not None}
        return given or UNLIMITED

    @property
    def limits_errors(self) -> bool:
        """Whether any error is limited."""
        return self.pose_deg is not None or self.depth_rel is not None

    @property
    def wants_speed(self) -> bool:
        """Whether layers must be chosen; a memory limit alone only concerns the weights."""
        return self.limits_errors or self.speedup is not None

    def share(self, errors: Mapping[str, float]) -> float:
        """The fraction of the budget that errors use; the larger one if two are limited."""
        return max(errors[name] / limit for name, limit in self.limits.items())

    def words(self) -> str:
        """The budget in one line."""
        given = [in_words({name: value}) for name in ERRORS if (value := getattr(self, name)) is not None]
        given += [f"{self.speedup:g}x"] if self.speedup is not None else []
        given += [f"{self.memory_bytes / 1e9:g} GB"] if self.memory_bytes is not None else []
        return ", ".join(given)


def in_words(errors: Mapping[str, float]) -> str:
    """Errors in one line: ``0.31 deg, 0.4 %``."""
    words = []
    if "pose_deg" in errors:
        words.append(f"{errors['pose_deg']:.3g} deg")
    if "depth_rel" in errors:
        words.append(f"{100 * errors['depth_rel']:.3g} % of the depth")
    return ", ".join(words)


def three_digits(value: float, *, up: bool) -> float:
    """A non-negative number rounded up or down to three digits; unchanged if not finite."""
    if value == 0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    count = float(f"{value / step:.9g}")  # 0.3 / 0.001 is a little less than 300
    return (math.ceil(count) if up else math.floor(count)) * step


def _number(option: str, text: str | None, units: Mapping[str, float], example: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", str(text).lower())
    if match is None or match[2] not in units:
        raise UserError(f"{option} {text}: give a number{' and its unit' if '' not in units else ''}, as {example}")
    return float(match[1]) * units[match[2]]
