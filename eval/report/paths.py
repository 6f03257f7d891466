"""The camera path from above, predicted against true: one figure per sequence, in the report's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from geoaccel.atomic import write_bytes
from geoaccel.cameras import invert_rigid
from geoaccel.eval.report.style import DENSE, FAINT, INK, literal, looks, new_figure, png, tidy
from geoaccel.windows.plot import ground_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = "path-"
"""Prefix of the files, before the name of the sequence."""


def path_pictures(folder: str | Path) -> dict[str, bytes]:
    """The figures of paths in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob(f"{PREFIX}*.png"))}


def write_path_pictures(folder: str | Path, figures: Mapping[str, Figure]) -> None:
    """Write the figures of sequences, by file name, and remove those of others."""
    folder = Path(folder)
    names = {f"{PREFIX}{name}.png": figure for name, figure in figures.items()}
    for old in path_pictures(folder).keys() - names.keys():
        (folder / old).unlink()
    for name, figure in names.items():
        write_bytes(folder / name, png(figure))


def plot_path(
    name: str,
    truth: Tensor,  # [S, 4, 4], cam_from_world
    predicted: Mapping[str, Sequence[Tensor]],  # [n, 3] each
) -> Figure:
    """Draw one sequence.

    Args:
        name: Name of the sequence.
        truth: True poses.
        predicted: By method, camera centres of each piece in ground-truth coordinates; ``dense`` is drawn as such.
    """
    world_from_cam = invert_rigid(truth).double().numpy()
    axes_of_ground = ground_axes(world_from_cam)
    figure = new_figure(6.4, 5.6)
    axes = figure.add_subplot()
    places = world_from_cam[:, :3, 3] @ axes_of_ground.T
    axes.plot(*places.T, color=FAINT, linewidth=3, alpha=0.6, solid_capstyle="round", label="true")
    axes.plot(*places[0], marker="o", markersize=7, color=INK, markerfacecolor="white", zorder=4)
    coloured = looks(label for label in predicted if label != "dense")
    for label, pieces in predicted.items():
        look = DENSE if label == "dense" else coloured[label]
        for number, piece in enumerate(pieces):
            shown = piece.double().numpy() @ axes_of_ground.T
            title = literal(label) if number == 0 else None
            axes.plot(*shown.T, color=look.color, linewidth=1.4, label=title, gid=label, zorder=3)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(literal(f"{name}, from above"), fontsize=10, color=INK, loc="left")
    axes.set_xlabel(
        "in the unit of the ground truth; circle: first frame; each piece is aligned separately", fontsize=8
    )
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure
