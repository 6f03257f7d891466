"""The result of a long sequence, and its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoaccel import export
from geoaccel.console import counted
from geoaccel.images.sources import Picture
from geoaccel.windows.assemble import NoPoints, Piece, build_scene
from geoaccel.windows.join import Joined
from geoaccel.windows.plot import FILE as PATH_FILE
from geoaccel.windows.plot import draw_path
from geoaccel.windows.predict import Lengths, Progress
from geoaccel.windows.store import Store, reader

logger = logging.getLogger(__name__)

REPORT = "windows.json"


@dataclass(frozen=True, eq=False)
class LongReconstruction:
    """Reconstruction of a long sequence.

    Attributes:
        names: Names of the frames.
        pieces: Connected parts of the sequence, each in its own world frame.
        unclosed: The same pieces without loop closure.
        joined: Windows, cuts, loops and edges.
        lengths: Lengths of the windows.
        unit: Unit of lengths in the scene.
        left_out: Images that were left out, and why.
        points: Points written for each piece; 0 for one that was left out because it has none.
        windows: First frame of each window, and its poses [F, 4, 4] in the window's own world frame.
    """

    names: list[str]
    pieces: list[Piece]
    unclosed: list[Piece]
    joined: Joined
    lengths: Lengths
    unit: str
    left_out: dict[str, str]
    points: list[int]
    windows: list[tuple[int, Tensor]]

    def summary(self) -> dict[str, Any]:
        """Summary for a calling program, as JSON-compatible values."""
        tried = self.joined.loops
        return {
            "frames": len(self.names),
            "window": self.lengths.window,
            "overlap": self.lengths.overlap,
            "windows": len({part.window for part in self.joined.parts}),
            "wide": sum(wide.used for wide in self.joined.wide),
            "wide_rejected": sum(not wide.used for wide in self.joined.wide),
            "pieces": [[piece.frames[0], piece.frames[-1], len(piece.frames)] for piece in self.pieces],
            "cuts": self.joined.cuts,
            "loops": sum(loop.closed for loop in tried),
            "loops_rejected": sum(not loop.closed for loop in tried),
            "unit": self.unit,
            "left_out": self.left_out,
        }


def write_pieces(
    work: Path,
    result: LongReconstruction,
    seen: Progress,
    store: Store,
    pictures: Sequence[Picture],
    names: Sequence[str],
    *,
    numbers: Mapping[str, int],
    conf_percentile: float,
    max_points: int | None,
    images: str,
    progress: bool,
) -> dict[str, Any]:
    """Write all pieces, and return the entries of ``files.json``; `numbers` are indices of the given images, by name.

    The confidence percentile is per window, and a piece may be its least confident part: if it removes all points of a
    piece, they are all kept; a piece without any point is left out.

    Raises:
        UserError: If no piece has points above the percentile.
    """
    read, frames = reader(store, seen.names), seen.frames
    sources = [pictures[frame.picture] for frame in frames]

    def read_original(frame: int) -> Tensor:
        return torch.from_numpy(np.array(sources[frame].read().convert("RGB")))

    about: dict[int, dict[str, Any]] = {}
    points = [0] * len(result.pieces)
    empty: dict[int, NoPoints] = {}
    alone = len(result.pieces) == 1
    with counted(len(frames), "frame", shown=progress, desc="writing") as bar:

        def write(number: int, percentile: float) -> None:
            scene, cloud = build_scene(
                result.pieces[number],
                result.joined,
                frames,
                read,
                store.folder,
                conf_percentile=percentile,
                max_points=max_points,
                paths=[picture.path for picture in sources],
                numbers=[numbers[picture.name] for picture in sources],
                read_original=read_original,
                on_frame=bar.update if number not in empty else lambda: None,
            )
            place = work if alone else work / _folder(number)
            place.mkdir(exist_ok=True)
            about[number] = export.write_into(place, scene, cloud, names, images=images)
            points[number] = len(cloud)

        for number in range(len(result.pieces)):
            try:
                write(number, conf_percentile)
            except NoPoints as error:
                empty[number] = error
        if not about:
            raise empty[0]
        for number in empty:
            frame = [frames[one].name for one in result.pieces[number].frames]
            named = f"piece {number + 1} ({frame[0]} to {frame[-1]})"
            try:
                write(number, 0.0)
                logger.warning("--conf-percentile would remove all points of %s, so all of them are kept", named)
            except NoPoints:
                logger.warning("%s has no points and is left out", named)
    result.points.extend(points)
    draw_path(result.pieces, result.joined.loops, work / PATH_FILE, result.unit)
    (work / REPORT).write_text(json.dumps(report(result), indent=1) + "\n")
    if alone:
        return about[0]
    written = [{"folder": _folder(number), **about[number]} for number in sorted(about)]
    return {"unit": result.unit, "pieces": written}


def _folder(number: int) -> str:
    """Folder of a piece, if there are several."""
    return f"piece_{number + 1}"


def report(result: LongReconstruction) -> dict[str, Any]:
    """Contents of ``windows.json``: parts and their placement, edges, loops and cuts."""
    joined = result.joined
    return {
        **{key: value for key, value in result.summary().items() if key != "left_out"},
        "pieces_left_out": [number for number, points in enumerate(result.points, 1) if not points],
        "parts": [
            {"window": part.window, "first": part.start, "last": part.stop - 1, "into_piece": where.matrix().tolist()}
            for part, where in zip(joined.parts, joined.similarities, strict=True)
        ],
        "edges": [
            {
                "from": edge.b,
                "to": edge.a,
                "loop": edge.loop,
                "wide": edge.wide,
                "sigma": edge.sigma,
                "scale": float(edge.similarity.scale),
            }
            for edge in joined.edges
        ],
        "wide_windows": [
            {
                "first": wide.frames[0],
                "last": wide.frames[-1],
                "every": wide.frames.step,
                "used": wide.used,
                "agreement": wide.agreement,
            }
            for wide in joined.wide
        ],
        "tried": [
            {"frames": [loop.match.first, loop.match.second], "cosine": loop.match.cosine, "closed": loop.closed}
            | vars(loop.found)
            for loop in joined.loops
        ],
    }
