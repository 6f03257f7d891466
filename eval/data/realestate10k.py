"""RealEstate10K: clips of walks through houses, poses from SLAM (Zhou et al., SIGGRAPH 2018).

    <root>/<split>/<clip>.txt                    as released: a URL, then one line per frame
    <root>/<split>/<clip>/<timestamp>.jpg        frames cut from the video (or .png), named by microseconds

or, as in the evaluation data of pi3,

    <root>/metadata/<split>/<clip>.txt
    <root>/<clip>/images/0000.png                the n-th line's frame

A line is: timestamp, fx, fy, cx, cy in units of the image's width and height, two zeros, ``cam_from_world`` 3 x 4 row
by row. Camera files: https://google.github.io/realestate10k/download.html (10,000 videos, about 80,000 clips, some
hundred megabytes). The frames must be extracted from YouTube, where more and more videos disappear, so results are
comparable only on the same list of clips: pi3 uses 1,719 test clips, others 1,800.

The scale of each clip is arbitrary. There is no depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import to_homogeneous
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_candidates

NUM_COLUMNS = 19
SUFFIXES = (".jpg", ".png", ".jpeg")


@reader("realestate10k", is_sequence=True)
def read(
    root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None, split: str = "test"
) -> Iterator[EvalScene]:
    """Yield the clips in order of name; those without any frames on disk are skipped too.

    Args:
        root: Folder of the dataset.
        scenes: Only these clips.
        on_skip: Called with each clip that is left out.
        split: ``test`` or ``train``.
    """
    folder = files.folder_of(root, "the RealEstate10K folder")
    by_index = (folder / "metadata" / split).is_dir()
    found = sorted((folder / "metadata" / split if by_index else folder / split).glob("*.txt"))
    if not found:
        raise FileNotFoundError(
            f"no {split}/*.txt and no metadata/{split}/*.txt under {folder}; fetch the camera files"
        )
    candidates = []
    for path in found:
        images = folder / path.stem / "images" if by_index else path.with_suffix("")
        candidates.append(Candidate(path.stem, None, partial(_read_clip, path, images, by_index)))
    return read_candidates(candidates, scenes, on_skip)


def _read_clip(path: Path, folder: Path, by_index: bool) -> EvalScene:
    images = {image.stem: image for image in sorted(folder.glob("*")) if image.suffix.lower() in SUFFIXES}
    if not images:
        raise FileNotFoundError(f"no frames in {folder}; extract them from the video, if it still exists")
    size = files.image_size(next(iter(images.values())))
    frames = []
    for i, (stamp, camera) in enumerate(_read_lines(path)):
        name = f"{i:04d}" if by_index else stamp
        if name not in images:
            raise FileNotFoundError(f"no frame {name} in {folder}; extract the frames again")
        sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
        intrinsics = torch.eye(3, dtype=torch.float64)
        intrinsics[0, 0], intrinsics[1, 1] = camera[:2] * sides
        intrinsics[:2, 2] = camera[2:4] * sides
        if not intrinsics.isfinite().all() or (camera[:2] <= 0).any():
            raise UserError(f"{path}, frame {stamp}: no positive, finite focal length; fetch the file again")
        frames.append(EvalFrame(name, to_homogeneous(camera[6:].view(3, 4)), intrinsics, images[name]))
    return make_scene(path.stem, frames)


def _read_lines(path: Path) -> list[tuple[str, Tensor]]:
    rows = []
    for line in files.read_text(path).splitlines()[1:]:
        words = line.split()
        if not words:
            continue
        try:
            numbers = torch.tensor([float(word) for word in words[1:]], dtype=torch.float64)
        except ValueError:
            numbers = torch.empty(0)
        if len(words) != NUM_COLUMNS or len(numbers) != NUM_COLUMNS - 1:
            raise UserError(f"{path}: {line[:40]!r}, expected {NUM_COLUMNS} numbers; fetch it again")
        rows.append((words[0], numbers))
    return rows
