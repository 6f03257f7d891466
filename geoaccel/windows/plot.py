"""``path.png``: the cameras' path from above, with windows coloured and loops drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geoaccel.cameras import invert_rigid
from geoaccel.export.drawing import FAINT, INK, PAPER
from geoaccel.export.frames import frame_colors
from geoaccel.windows.assemble import Piece
from geoaccel.windows.join import Loop

FILE = "path.png"
WIDTH = 6.0  # inches of one piece
A_ROW = 3
"""Pieces in a row."""
MOST = 30
"""Pieces that are drawn, the longest ones: an image of hundreds would be tens of thousands of pixels high."""


def ground_axes(world_from_cam: np.ndarray) -> np.ndarray:  # [2, 3]
    """Axes of the map: perpendicular to the cameras' mean up direction, aligned with the path's longest extent."""
    centres = world_from_cam[:, :3, 3] - world_from_cam[:, :3, 3].mean(axis=0)
    up = -world_from_cam[:, :3, 1].mean(axis=0)
    if np.linalg.norm(up) < 0.3:  # the cameras have no common up direction
        return np.linalg.svd(centres, full_matrices=False)[2][:2]
    up /= np.linalg.norm(up)
    flat = centres - np.outer(centres @ up, up)
    right = np.linalg.svd(flat, full_matrices=False)[2][0]
    right = right - (right @ up) * up
    length = np.linalg.norm(right)
    right = right / length if length > 1e-6 else world_from_cam[0, :3, 0]
    return np.stack([right, np.cross(right, -up)])


def draw_path(pieces: Sequence[Piece], loops: Sequence[Loop], path: Path, unit: str) -> None:
    """Draw the longest pieces, at most `MOST`, each in its own world, a few in a row.

    Args:
        pieces: With the poses of their frames.
        loops: Closed ones are drawn if both of their frames are in one piece.
        path: File to write.
        unit: Unit of the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = sorted(pieces, key=lambda piece: len(piece.frames), reverse=True)[:MOST]
    drawn = sorted(longest, key=lambda piece: piece.frames[0])
    across = min(A_ROW, len(drawn))
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(WIDTH * across, WIDTH * down), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    if len(drawn) < len(pieces):
        figure.suptitle(f"the {MOST} longest of {len(pieces)} pieces", fontsize=9, color=INK)
    for number, piece in enumerate(drawn):
        axes = figure.add_subplot(down, across, number + 1)
        world_from_cam = invert_rigid(piece.cam_from_world).numpy()
        places = world_from_cam[:, :3, 3] @ ground_axes(world_from_cam).T
        parts = np.asarray(piece.part)
        shades = frame_colors(int(parts.max()) - int(parts.min()) + 1)
        for part in np.unique(parts):
            own = np.flatnonzero(parts == part)
            line = np.arange(own[0], min(own[-1] + 2, len(places)))
            axes.plot(*places[line].T, color=shades[part - parts.min()], linewidth=2.5, solid_capstyle="round")
        at = {frame: place for place, frame in enumerate(piece.frames)}
        for loop in loops:
            ends = [at.get(loop.match.first), at.get(loop.match.second)]
            if loop.closed and None not in ends:
                axes.plot(*places[ends].T, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), marker="o", markersize=2.5)
        axes.plot(*places[0], marker="o", markersize=7, color=INK, markerfacecolor=PAPER)
        first, last = piece.frames[0], piece.frames[-1]
        axes.set_title(f"frames {first} to {last}, {len(np.unique(parts))} windows", fontsize=9, color=INK)
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(labelsize=7, colors=FAINT)
        axes.set_xlabel(f"unit: {unit}; the circle is the first frame, dashed lines are loops", fontsize=7, color=FAINT)
        for spine in axes.spines.values():
            spine.set_color(FAINT)
            spine.set_linewidth(0.5)
    figure.savefig(path, dpi=130, metadata={"Software": None})
