"""CO3Dv2 as evaluation scenes: objects filmed in a circle (Reizenstein et al., ICCV 2021).

    <root>/<category>/frame_annotations.jgz  sequence_annotations.jgz  set_lists/set_lists_fewview_dev.json
    <root>/<category>/<sequence>/images/  masks/  depths/  depth_masks/  pointcloud.ply

From https://github.com/facebookresearch/co3d (51 categories, 5.5 TB; the single-sequence subset takes 8.9 GB).
CC BY-NC 4.0. `geoaccel.eval.data.co3d` has the format, `geoaccel.eval.data.co3d_lists` the lists that VGGT evaluates.

A scene is "apple_110_13051_23361" of category "apple". Its scale is arbitrary; depth is COLMAP's, in that scale.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.co3d import Co3dFrame, SequenceEntry, group_annotations, list_categories
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, Categories, EvalFrame, EvalScene, OnSkip, make_scene, read_candidates
from geoaccel.registry import unknown


@reader("co3d")
def read(
    root: str | Path | None,
    *,
    scenes: Collection[str] | None = None,
    on_skip: OnSkip | None = None,
    subset: str | None = None,
    split: str | None = None,
    min_quality: float | None = None,
) -> Iterator[EvalScene]:
    """Yield sequences, ordered by category and name. Annotations of one category are in memory at a time.

    Args:
        root: Folder with one folder per category.
        scenes: Only these sequences ("apple_110_13051_23361") or categories ("apple").
        on_skip: Called with each sequence that is left out, and with each category whose annotations cannot be read.
        subset: Only frames of ``set_lists/set_lists_<subset>.json``.
        split: Only frames of this part of the subset.
        min_quality: Only sequences with a higher camera quality (``viewpoint_quality_score``).

    Raises:
        FileNotFoundError, ValueError: ``root`` is not the dataset, or no category could be read; the first reason.
    """
    folder = files.folder_of(root, "the CO3Dv2 folder with one folder per category")
    if split is not None and subset is None:
        raise UserError(f"split={split!r} is part of a subset; give subset= too, such as 'fewview_dev'")
    if min_quality is not None and (isinstance(min_quality, bool) or not isinstance(min_quality, int | float)):
        raise UserError(f"min_quality={min_quality!r}: give a number, such as 0.5, or null for all sequences")
    categories = list_categories(folder)
    return _read(folder, wanted_by_category(categories, scenes), on_skip, subset, split, min_quality)


def wanted_by_category(categories: list[str], scenes: Collection[str] | None) -> dict[str, list[str] | None]:
    """Categories to read, each with the names requested in it; None for all.

    Raises:
        ValueError: If a name does not begin with a category.
    """
    if scenes is None:
        return dict.fromkeys(categories)
    names = [scenes] if isinstance(scenes, str) else sorted(scenes)
    chosen = {c: [name for name in names if name == c or name.startswith(f"{c}_")] for c in categories}
    for name in names:
        if not any(name in inside for inside in chosen.values()):
            raise UserError(unknown("scene", name, categories))
    return {category: inside for category, inside in chosen.items() if inside}


def _read(
    root: Path,
    wanted: dict[str, list[str] | None],
    on_skip: OnSkip | None,
    subset: str | None,
    split: str | None,
    min_quality: float | None,
) -> Iterator[EvalScene]:
    found = Categories(on_skip)
    for category, names in wanted.items():
        try:
            entries = group_annotations(root, category, subset=subset, split=split).values()
        except (UserError, OSError) as error:
            found.skip(category, error)
            continue
        candidates = [Candidate(f"{category}_{e.name}", category, partial(_scene, e, min_quality)) for e in entries]
        yield from read_candidates(candidates, names, on_skip)
    found.finish(len(wanted))


def _scene(entry: SequenceEntry, min_quality: float | None) -> EvalScene:
    quality = entry.quality
    if min_quality is not None and not (isinstance(quality, int | float) and quality > min_quality):
        raise UserError(f"camera quality {quality}; needs more than {min_quality:g} (min_quality)")
    sequence = entry.read()
    return make_scene(
        f"{sequence.category}_{sequence.name}",
        [_frame(frame) for frame in sequence.frames],
        category=sequence.category,
        read_points=None
        if sequence.point_cloud_path is None
        else partial(files.read_points, sequence.point_cloud_path),
    )


def _frame(frame: Co3dFrame) -> EvalFrame:
    return EvalFrame(
        name=f"frame{frame.number:06d}",
        cam_from_world=frame.cam_from_world,
        intrinsics=frame.intrinsics,
        image_path=frame.image_path,
        read_image=frame.image,
        read_depth=None if frame.depth_path is None else partial(_known, frame, "depth"),
        read_mask=None if frame.mask_path is None else partial(_known, frame, "mask"),
    )


def _known(frame: Co3dFrame, what: str):
    return getattr(frame, what)()
