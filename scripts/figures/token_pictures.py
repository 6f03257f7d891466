"""The figures of docs/methods/: what each merging method does to the patches of a rendered scene.

python scripts/figures/token_pictures.py            # docs/methods/NAME.png, all of them
python scripts/figures/token_pictures.py httm come  # only these

Every method runs with its defaults, without bypass, on the same 16 frames; the first four are shown.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from geoaccel.atomic import write_bytes
from geoaccel.errors import UserError, run_program
from geoaccel.eval.report.style import FAINT, INK
from geoaccel.registry import unknown
from table_parts import ROOT
from token_plans import FRAMES, LOOKS, MODEL, SEED, SHOWN, SIZE, Row, images, look

FOLDER = ROOT / "docs" / "methods"
GAP, MARGIN, LINE = 12, 16, 34
"""Pixels between frames, around everything, and of a line of text."""

GOLDEN = 0.618
"""From the hue of a group to that of the next: neighbours in size are far apart in colour."""

COLOURS = 160
"""Of the palette of a PNG."""

Pixels = NDArray[np.float64]


def picture(name: str) -> bytes:
    """A PNG of what a method does."""
    from matplotlib.figure import Figure

    rows = look(name)
    frames = images()[0, :SHOWN].permute(0, 2, 3, 1).double().numpy()
    strips = [("photographs", frames), *((row.title, painted(row, frames)) for row in rows)]
    width = SHOWN * SIZE + (SHOWN - 1) * GAP + 2 * MARGIN
    height = len(strips) * (SIZE + LINE + GAP) + LINE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    top = float(height)
    for title, strip in strips:
        write(figure, MARGIN, top - LINE / 2 - 3, title, INK, (width, height))
        top -= LINE
        for i, frame in enumerate(strip):
            place = (MARGIN + i * (SIZE + GAP), top - SIZE)
            axes = figure.add_axes((place[0] / width, place[1] / height, SIZE / width, SIZE / height))
            axes.imshow(frame, interpolation="nearest", aspect="auto")
            axes.axis("off")
        top -= SIZE + GAP
    note = f"{name} on {MODEL}: the first {SHOWN} of {FRAMES} frames of rendered scene {SEED}"
    write(figure, MARGIN, top - LINE / 2 + 4, note, FAINT, (width, height))
    return packed(figure, said(rows))


def said(rows: Iterable[Row]) -> list[dict[str, list[int]]]:
    """What the rows say of the patches, as it stands in the PNG; a group is called by its first patch that is shown."""
    found = []
    for row in rows:
        parts = {name: part.int() for name in ("dots", "dark") if (part := getattr(row, name)) is not None}
        if row.group is not None:
            flat = row.group.flatten()
            parts["group"] = flat.where(flat < 0, (flat == flat[:, None]).int().argmax(1))
        found.append({name: part.flatten().tolist() for name, part in parts.items()})
    return found


def kept(name: str) -> list[dict[str, list[int]]]:
    """The same, as the picture of a method holds it."""
    with Image.open(FOLDER / f"{name}.png") as png:
        return json.loads(png.info["patches"])


def painted(row: Row, frames: Pixels) -> Pixels:  # [S, H, W, 3]
    """Photographs with what a row says of their patches."""
    if row.heat is not None:
        from matplotlib import colormaps

        frames = colormaps["viridis"](blown_up(row.heat.numpy()))[..., :3]
    if row.dark is not None:
        frames = np.where(blown_up(row.dark.numpy())[..., None], 0.22 * frames, frames)
    if row.group is not None:
        group = row.group.numpy()
        tint = blown_up(tints(group))
        grey = 0.3 + 0.7 * frames.mean(-1, keepdims=True)
        frames = np.where(blown_up(group >= 0)[..., None], tint * (0.35 + 0.65 * grey), grey)
        frames = np.where(edges(group)[..., None], 1.0, frames)
    if row.dots is not None:
        frames = dotted(frames, row.dots.numpy())
    return frames


def blown_up(patches: NDArray[Any]) -> NDArray[Any]:  # [S, h, w, ...] to [S, H, W, ...]
    """Every patch as its pixels."""
    side = SIZE // patches.shape[1]
    return patches.repeat(side, axis=1).repeat(side, axis=2)


def tints(group: NDArray[np.int64]) -> Pixels:  # [S, h, w] to [S, h, w, 3]
    """One colour per group, the same in all frames."""
    from matplotlib.colors import hsv_to_rgb

    names, which, counts = np.unique(group, return_inverse=True, return_counts=True)
    place = np.empty(len(names))
    place[np.lexsort((names, -counts))] = np.arange(len(names))
    hues = place * GOLDEN % 1
    return hsv_to_rgb(np.stack([hues, 0.6 + 0 * hues, 0.95 + 0 * hues], -1))[which.reshape(group.shape)]


def edges(group: NDArray[np.int64]) -> NDArray[np.bool_]:  # [S, h, w] to [S, H, W]
    """The pixels where a group ends."""
    pixels = blown_up(group)
    found = np.zeros(pixels.shape, bool)
    found[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
    found[:, :, 1:] |= pixels[:, :, 1:] != pixels[:, :, :-1]
    return found


def dotted(frames: Pixels, dots: NDArray[np.bool_]) -> Pixels:
    """Frames with a dot, dark around its rim, in the middle of each marked patch."""
    side = SIZE // dots.shape[1]
    across = np.arange(side) - (side - 1) / 2
    distance = np.hypot(across[:, None], across)
    disc = np.tile(distance, (*dots.shape[1:],))
    marked = blown_up(dots)
    frames = np.where((marked & (disc < 3.6))[..., None], 0.1, frames)
    return np.where((marked & (disc < 2.4))[..., None], 1.0, frames)


def write(figure: Any, x: float, y: float, text: str, colour: str, size: tuple[int, int]) -> None:
    """A line of text, from its left edge in pixels on."""
    figure.text(x / size[0], y / size[1], text, fontsize=13, color=colour, va="center")


def packed(figure: Any, patches: object) -> bytes:
    """A figure as a PNG with few colours, which holds what it shows of the patches."""
    text = PngInfo()
    text.add_text("patches", json.dumps(patches), zip=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    few = Image.open(buffer).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, format="PNG", optimize=True, pnginfo=text)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; all of them if none is named")
    names = parser.parse_args().names or list(LOOKS)
    for name in names:
        if name not in LOOKS:
            raise UserError(unknown("merging method", name, list(LOOKS)))
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        path = FOLDER / f"{name}.png"
        write_bytes(path, picture(name))
        print(path)


if __name__ == "__main__":
    sys.exit(run_program("token_pictures", main))
