"""Check whether two groups of frames of one forward show the same place, by their point maps and colours.

A network places frames of two places into one world just as well. If it really is one place, points of one group lie on
surfaces seen by the other, and have their colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.cameras import transform_points
from geoaccel.windows.fit import LEAST_SURE, TOLERANCE
from geoaccel.windows.store import Window

SIDE = 28
"""Points per side of the grid of a frame that is compared with the other group."""
MOST_FRAMES = 8
"""Most frames of each group, evenly spread."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of two groups of frames; the worse of both directions.

    Attributes:
        depth: Of the points that fall into the other group's view, the fraction that lies on a surface seen there.
        colour: Correlation of their colours with those seen there, in [-1, 1].
        seen: Mean fraction of the points that fall into the view of a frame of the other group.
    """

    depth: float
    colour: float
    seen: float

    def reaches(self, least: Agreement) -> bool:
        """Whether it is at least as good as another one, in all three."""
        return self.depth >= least.depth and self.colour >= least.colour and self.seen >= least.seen


def agreement(window: Window, first: Sequence[int], second: Sequence[int]) -> Agreement:
    """Compare two groups of a window's frames, given by their rows."""
    first, second = (_spread(rows) for rows in (first, second))
    there, back = _one_way(window, first, second), _one_way(window, second, first)
    return Agreement(*(min(pair) for pair in zip(there, back, strict=True)))


def _spread(rows: Sequence[int]) -> list[int]:
    places = torch.linspace(0, len(rows) - 1, min(len(rows), MOST_FRAMES)).round().long().unique()
    return [rows[place] for place in places.tolist()]


def _one_way(window: Window, source: list[int], target: list[int]) -> tuple[float, float, float]:
    height, width = window.depth.shape[1:]
    grid = [torch.linspace(0, side - 1, min(side, SIDE)).round().long() for side in (height, width)]
    weights = torch.cat([window.weights(slice(row, row + 1), LEAST_SURE) for row in source])
    sure = weights[:, grid[0]][:, :, grid[1]].flatten() > 0
    points = torch.cat([window.points(slice(row, row + 1)) for row in source])
    points = points[:, grid[0]][:, :, grid[1]].reshape(-1, 3)[sure]
    colors = window.pixels[source][:, :, grid[0]][..., grid[1]].permute(0, 2, 3, 1).reshape(-1, 3)[sure].float()
    agreeing, inside, seen = 0, 0, []
    for row in target:
        there = transform_points(window.cam_from_world[row], points)
        z = there[:, 2]
        pixel = (there @ window.intrinsics[row].T)[:, :2] / z[:, None].clamp(min=1e-9)
        u, v = pixel.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, max(height, width)).floor().long().unbind(-1)
        falls = (z > 1e-9) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
        falls &= window.weights(slice(row, row + 1), LEAST_SURE)[0, v, u] > 0
        apart = (z.clamp(min=1e-9) / window.depth[row, v, u].clamp(min=1e-9)).log().abs()
        agreeing += int((falls & (apart < TOLERANCE)).sum())
        inside += int(falls.sum())
        seen.append(torch.stack([colors[falls], window.pixels[row][:, v[falls], u[falls]].T.float()]))
    share = inside / max(1, len(points) * len(target))
    return agreeing / max(1, inside), _correlation(torch.cat(seen, dim=1)), share


def _correlation(pairs: Tensor) -> float:  # [2, N, 3]
    """Correlation of colours, each channel about its own mean."""
    if pairs.shape[1] < 2:
        return 0.0
    own, other = (colors - colors.mean(dim=0) for colors in pairs)
    return float((own * other).sum() / (own.norm() * other.norm()).clamp(min=1e-9))
