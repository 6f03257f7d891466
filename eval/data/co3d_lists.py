"""CO3Dv2 with the sequence lists that VGGT evaluates on, and VGGT's own random draws of frames.

    <annotations>/<category>_test.jgz        gzipped JSON: {sequence: [{"filepath", "R", "T", ...}, ...], ...}
    <root>/<category>/<sequence>/images/frame000001.jpg

``filepath`` is relative to ``<root>``, the CO3Dv2 folder (`geoaccel.eval.data.co3d_scenes`); R and T are the
viewpoint of CO3D's annotations (PyTorch3D: row vectors, x left, y up). The lists come from VGGT's preprocessing
(``evaluation/preprocess_co3d.py`` of https://github.com/facebookresearch/vggt, after RelPose++): frames of
``fewview_dev`` in sequences with a viewpoint quality above 0.5. They do not contain image sizes, so there are no
intrinsics; depth and points are not read.

VGGT draws frames with one random generator for the whole run, which only sufficiently long sequences consume. With
``replay`` the reader does the same, using only the lists: a photograph missing on disk loses its scene, as in the
original, but does not affect other scenes. A run over fewer categories draws differently, also in the original; so a
damaged list ends a replay, whereas otherwise only its category is lost.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.co3d import OPENCV_FROM_PYTORCH3D
from geoaccel.eval.data.co3d_scenes import wanted_by_category
from geoaccel.eval.data.frames import VggtReplay
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, Categories, EvalFrame, EvalScene, OnSkip, make_scene, read_candidates
from geoaccel.images.read import one_line

# The categories in VGGT's training data, on which it is evaluated, in the order in which frames are drawn
SEEN_CATEGORIES = tuple(
    """
    apple backpack banana baseballbat baseballglove bench bicycle bottle bowl broccoli cake car carrot cellphone chair
    cup donut hairdryer handbag hydrant keyboard laptop microwave motorcycle mouse orange parkingmeter pizza plant
    stopsign teddybear toaster toilet toybus toyplane toytrain toytruck tv umbrella vase wineglass
    """.split()  # noqa: SIM905
)
MAX_TRANSLATION_SUM = 1e5


@reader("co3d_lists")
def read(
    root: str | Path | None,
    *,
    scenes: Collection[str] | None = None,
    on_skip: OnSkip | None = None,
    annotations: str | Path | None = None,
    replay: VggtReplay | None = None,
) -> Iterator[EvalScene]:
    """Yield the sequences of the lists, ordered by category and name.

    Args:
        root: CO3Dv2 folder with the photographs.
        scenes: Only these sequences or categories; this does not change which frames are drawn.
        on_skip: Called with each sequence that is left out, and, unless frames are replayed, with each damaged list.
        annotations: Folder of the lists; by default ``root``.
        replay: Draw frames as VGGT does; by default all frames.
    """
    folder = files.folder_of(root, "the CO3Dv2 folder with one folder per category")
    lists = folder if annotations is None else files.folder_of(annotations, "the folder of <category>_test.jgz")
    categories = [c for c in SEEN_CATEGORIES if (lists / f"{c}_test.jgz").is_file()]
    if not categories:
        raise FileNotFoundError(f"no <category>_test.jgz in {lists}; give annotations=, the folder of VGGT's lists")
    return _read(folder, lists, categories, wanted_by_category(categories, scenes), on_skip, replay)


def _read(
    root: Path,
    lists: Path,
    categories: list[str],
    wanted: dict[str, list[str] | None],
    on_skip: OnSkip | None,
    replay: VggtReplay | None,
) -> Iterator[EvalScene]:
    draws = replay.start() if replay is not None else None
    # Only a replay needs lists without requested scenes: their sequences consume random numbers, too
    needed = [c for c in categories if draws is not None or c in wanted]
    found = Categories(on_skip)
    for category in needed:
        try:
            entries = _read_list(lists / f"{category}_test.jgz")
        except UserError as error:
            if draws is not None:
                raise
            found.skip(category, error)
            continue
        names = sorted(entries) if draws is None else draws.sequences(sorted(entries))
        candidates = []
        for name in names:
            chosen, reason = entries[name], _too_far(entries[name])
            if draws is not None and reason is None:
                indices, reason = draws.indices(len(chosen))
                chosen = [chosen[i] for i in indices]
            build = partial(_scene, root, category, name, chosen, reason, draws is not None)
            candidates.append(Candidate(f"{category}_{name}", category, build))
        if category in wanted:
            yield from read_candidates(candidates, wanted[category], on_skip)
    found.finish(len(needed))


def _too_far(entries: list[dict[str, Any]]) -> str | None:
    for entry in entries:
        if sum(entry["T"]) > MAX_TRANSLATION_SUM:
            return f"{entry['filepath']} has a translation that adds up to more than {MAX_TRANSLATION_SUM:g}"
    return None


def _scene(
    root: Path, category: str, name: str, entries: list[dict[str, Any]], reason: str | None, exact: bool
) -> EvalScene:
    if reason is not None:
        raise UserError(reason)
    frames = []
    for entry in entries:
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = OPENCV_FROM_PYTORCH3D @ torch.tensor(entry["R"], dtype=torch.float64).reshape(3, 3).T
        pose[:3, 3] = OPENCV_FROM_PYTORCH3D @ torch.tensor(entry["T"], dtype=torch.float64)
        path = files.existing(root / entry["filepath"])
        frames.append(EvalFrame(path.stem, pose, None, path))
    scene = make_scene(f"{category}_{name}", frames, category=category)
    if exact and scene.dropped:
        raise UserError(str(scene.dropped[0]))
    return scene


def _read_list(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        document = json.loads(gzip.decompress(path.read_bytes()))
        for entries in document.values():
            for entry in entries:
                if (
                    not isinstance(entry["filepath"], str)
                    or len(entry["T"]) != 3
                    or [len(r) for r in entry["R"]] != [3] * 3
                ):
                    raise UserError("a frame without filepath, R [3, 3] and T [3]")
                sum(entry["T"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a frame list of VGGT's preprocessing ({one_line(error)}); rerun it") from None
    return document
