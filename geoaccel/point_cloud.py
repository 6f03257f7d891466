"""The point cloud of a reconstruction: its confident points, and the pixel that each comes from."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from geoaccel.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class PointCloud:
    """Coloured points and the pixel each one came from.

    Attributes:
        points: World coordinates [N, 3], float32.
        colors: sRGB [N, 3], uint8.
        frame: Index of the frame each point was seen in [N], int64.
        pixels: Coordinates (u, v) in that frame's original image [N, 2], pixel centres at half-integers.
        conf: [N], the model's confidence.
        kept_share: Fraction of the valid pixels that passed the confidence filter and the mask, before downsampling to
            a maximum number of points.
    """

    points: Tensor
    colors: Tensor
    frame: Tensor
    pixels: Tensor
    conf: Tensor
    kept_share: float

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        kept = f"{100 * self.kept_share:.0f} % of the pixels kept"
        return f"PointCloud of {len(self):,} points of {len(self.frame.unique())} images, {kept}"

    def thin(self, max_points: int | None, *, seed: int = 0) -> PointCloud:
        """At most `max_points` of the points, sampled at random, in their old order."""
        if max_points is None or len(self) <= max_points:
            return self
        rows = random_rows(len(self), max_points, seed)
        return PointCloud(
            points=self.points[rows],
            colors=self.colors[rows],
            frame=self.frame[rows],
            pixels=self.pixels[rows],
            conf=self.conf[rows],
            kept_share=self.kept_share,
        )


def check_max_points(max_points: int | None) -> None:
    """Refuse a limit that leaves no point."""
    if max_points is None:
        return
    if isinstance(max_points, bool) or not isinstance(max_points, Integral):
        raise UserError(f"max_points={max_points!r} is not a whole number; give 1 or more, or None for all points")
    if max_points < 1:
        raise UserError(f"max_points={max_points} is too small; give 1 or more")


def random_rows(count: int, wanted: int, seed: int) -> Tensor:  # [wanted]
    """Indices of a random selection without repetition, ascending."""
    check_max_points(wanted)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
