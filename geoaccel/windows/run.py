"""A sequence of any length, in overlapping windows: predicted one by one, joined, and written to files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoaccel import export
from geoaccel.backbone import METRE
from geoaccel.console import counted
from geoaccel.edges import check_edge_filter
from geoaccel.errors import DiskFull, UserError
from geoaccel.images import load_images
from geoaccel.images.elsewhere import absolute
from geoaccel.images.sources import list_pictures
from geoaccel.inputs import fitted_to
from geoaccel.memory import Limit
from geoaccel.memory_plan import MemoryPlan
from geoaccel.point_cloud import check_max_points
from geoaccel.reference import Reference
from geoaccel.scene import CONF_PERCENTILE, check_conf_percentile
from geoaccel.windows.assemble import place_frames
from geoaccel.windows.frames import Seen
from geoaccel.windows.graph import require_scipy
from geoaccel.windows.identity import facts_of, same, settings_of
from geoaccel.windows.join import (
    Candidate,
    Joined,
    Loop,
    Part,
    candidates,
    features_of,
    find_cuts,
    join,
    neighbours,
    owner,
    split,
    try_loop,
)
from geoaccel.windows.predict import Lengths, Predictor, Progress, check_lengths, lengths_for, plan_for, stream
from geoaccel.windows.result import LongReconstruction, write_pieces
from geoaccel.windows.shapes import of_one_shape
from geoaccel.windows.store import Store, Window, reader
from geoaccel.windows.wide import Wide, count_wide, widen
from geoaccel.workers import Here, Task, Workers

FORMATS = ("ply", "glb", "colmap", "colmap-text", "tum", "kitti")
"""Formats for sequences; the others need all images or depths at once."""
DEFAULT_FORMATS = ("ply", "glb", "colmap", "tum")


def check_formats(formats: str | Sequence[str]) -> list[str]:
    """Names of formats, if all of them work for sequences.

    Raises:
        UserError: Naming one that does not work with windows.
    """
    names = export.read_formats(formats)
    if refused := next((name for name in names if name not in FORMATS), None):
        raise UserError(f"format {refused} does not work with --window; use some of {', '.join(FORMATS)}")
    return names


def run_windows(
    source: Any,
    *,
    workers: Here | Workers,
    out: str | Path,
    formats: str | Sequence[str] | None = DEFAULT_FORMATS,
    window: int | str = "auto",
    overlap: int | None = None,
    auto: Lengths | None = None,
    wide: bool = True,
    loops: bool = True,
    reference: Reference = "auto",
    size: int | None = None,
    mode: str | None = None,
    edge_filter: float | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    recursive: bool = False,
    skip_bad: bool = False,
    max_memory: str | int | None = None,
    conf_percentile: float = CONF_PERCENTILE,
    max_points: int | None = 1_000_000,
    images: str = "link",
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> LongReconstruction:
    """Implementation of :func:`geoaccel.reconstruct_windows`, for a caller that holds the lock of the folder.

    Args:
        source, out: As there.
        workers: Where the model runs: this process, or others that read and predict several windows at a time. Joining
            is done here, in order.
        formats: Names from `FORMATS`; None writes no result, and `out` only holds the windows meanwhile.
        window: Frames of a window; ``auto``: as many as fit into memory, at most 60.
        overlap: Frames shared with the next window; half of the window by default.
        auto: Window length for ``auto``, so that several sequences share one length; None: what fits now.
        wide: Also predict windows over every fourth frame, every sixteenth, and so on.
        loops: Close loops.
        reference: Reference view of each window: ``auto``, the frame that is most like the others, or ``first``.
        size, mode, edge_filter, fps, max_frames, recursive, skip_bad, max_memory: As of :func:`geoaccel.reconstruct`.
        conf_percentile, max_points, images, overwrite: As for `Reconstruction.save`; the percentage applies to each
            window, and one point per voxel stays.
        about: Additional entries of ``files.json``, as plain data.
        progress: Show progress bars.
        tell: Called with messages for the user.
    """
    names = [] if formats is None else check_formats(formats)
    _check(window, overlap, reference, edge_filter, conf_percentile, max_points, images)
    told = workers.ask(facts_of)
    same([one.identity for one in told])
    facts = told[0]
    preprocess = fitted_to(facts.preprocess, size, mode)
    pictures = list_pictures(source, fps, max_frames, recursive=recursive)
    numbers = {picture.name: number for number, picture in enumerate(pictures)}
    pictures, of_other_shape = of_one_shape(pictures, preprocess, skip_bad=skip_bad)
    if isinstance(workers, Workers):
        pictures = absolute(pictures)
    check_lengths(window, overlap, len(pictures))
    paths = [picture.path for picture in pictures]
    files = [path for path in paths if path is not None]
    export.check_output_folder(out, overwrite=overwrite, inputs=files)
    export.check_names([picture.name for picture in pictures], names)
    export.check_images(images, names, [(picture.name, picture.path) for picture in pictures], out)
    first = load_images(list(pictures[:1]), preprocess) if not skip_bad else None
    options: dict[str, Any] = {"window": window, "overlap": overlap, "reference": reference}
    options |= {"edge_filter": edge_filter, "skip_bad": skip_bad}
    store = Store(out, {**facts.identity, **settings_of(pictures, preprocess, options)})
    if store.discarded:
        tell(f"windows of an earlier run cannot be reused ({store.discarded}); starting over")
    with _kept(store):
        height, width = (preprocess.size, preprocess.size) if first is None else first.images.shape[-2:]
        shape = (height, width)
        limit = Limit.of(max_memory, heads=facts.heads)
        found = auto if window == "auto" else None
        found = found or min(workers.ask(lengths_for, window, overlap, shape, limit), key=lambda one: one.window)
        lengths = Lengths(*store.note("lengths", [found.window, found.overlap]))
        try:
            plans = workers.ask(plan_for, min(lengths.window, len(pictures)), shape, limit)
        except UserError as error:
            if auto is None:
                raise
            raise UserError(
                f"windows of {auto.window} frames, with which this run began, do not fit into free memory now; free "
                f"some, or start over in another folder ({error})"
            ) from error
        plan = next((plan for plan in plans if plan is not None), None)
        noted = store.note("plan", None if plan is None else asdict(plan))
        predictor = Predictor(reference, edge_filter, None if noted is None else MemoryPlan(**noted))
        with counted(len(pictures), "frame", shown=progress, desc="windows") as bar:

            def on_window(done: int) -> None:
                bar.set_postfix(windows=f"{len(seen.names)} of {len(lengths.chunks(len(pictures)))}")
                bar.update(done - bar.n)

            seen = Progress(left_out=of_other_shape)
            stream(
                pictures, preprocess, lengths, predictor, workers, store, seen, skip_bad=skip_bad, on_window=on_window
            )
        made = partial(_made, store=store, workers=workers, predictor=predictor)
        joined = _joined(seen, store, made, lengths, wide=wide, loops=loops, progress=progress, tell=tell)
        read = reader(store, seen.names)
        pieces = place_frames(joined, len(seen.frames), read)
        unclosed = place_frames(joined, len(seen.frames), read, closed=False)
        result = LongReconstruction(
            names=[frame.name for frame in seen.frames],
            pieces=pieces,
            unclosed=unclosed,
            joined=joined,
            lengths=lengths,
            unit=read(0).unit,
            left_out=seen.left_out,
            points=[],
            windows=[store.own_poses(name) for name in seen.names],
        )
        if formats is None:
            store.remove()
            return result
        document = dict(about or {})
        with export.atomic_folder(out, overwrite=overwrite, inputs=files, about=document) as work:
            kept: dict[str, Any] = {"conf_percentile": conf_percentile, "max_points": max_points, "images": images}
            kept["numbers"] = numbers
            document |= write_pieces(work, result, seen, store, pictures, names, progress=progress, **kept)
    store.remove()
    return result


def _check(
    window: int | str,
    overlap: int | None,
    reference: Reference,
    edge_filter: float | None,
    conf_percentile: float,
    max_points: int | None,
    images: str,
) -> None:
    require_scipy()
    check_lengths(window, overlap)
    if reference not in ("auto", "first"):
        raise UserError(f"reference={reference!r}: every window has its own reference (--window); give auto or first")
    check_edge_filter(edge_filter)
    check_conf_percentile(conf_percentile)
    check_max_points(max_points)
    if images not in ("link", "copy"):
        raise UserError(f"images={images!r} (--images) does not work with windows; give link or copy")


def _made(
    wanted: Iterable[tuple[str, Callable[[], Seen]]], *, store: Store, workers: Here | Workers, predictor: Predictor
) -> Iterator[Window]:
    """Windows over frames of existing windows, in order: from disk, or predicted and stored there.

    Args:
        wanted: The name of each, and a function that returns its input.
        store, workers, predictor: Those of the run.
    """

    def tasks() -> Iterator[Task]:
        for name, look in wanted:
            seen = None if store.has(name) else look()
            yield (name, seen), None if seen is None else (predictor, seen)

    for done in workers.in_order(tasks()):
        name, seen = done.name
        if seen is not None:
            store.write(name, seen.whole(done.get()))
        yield store.read(name)


def _joined(
    seen: Progress,
    store: Store,
    made: Callable[..., Iterator[Window]],
    lengths: Lengths,
    *,
    wide: bool,
    loops: bool,
    progress: bool,
    tell: Callable[[str], object],
) -> Joined:
    read = reader(store, seen.names)
    with_scale = read(0).unit != METRE
    features = features_of([(s[0], f) for s, f in zip(seen.spans, seen.features, strict=True)], len(seen.frames))
    if features is None and loops:
        tell("this network gives no encoder features: loops and cuts are not detected")
    cuts = find_cuts(seen.spans, features, read)
    parts = split(seen.spans, cuts)
    edges = [edge for _, edge in neighbours(parts, read, with_scale=with_scale) if edge is not None]
    widened: list[Wide] = []
    if wide:
        count = count_wide(parts, edges, lengths.window)
        with counted(count, "window", shown=progress and count > 0, desc="wide windows") as bar:

            def predict(level: Sequence[range]) -> Iterator[Window]:
                return made(
                    (f"wide_{one.step}_{one.start:06d}", partial(_over, one, parts, seen, store)) for one in level
                )

            widened, more = widen(
                parts, edges, lengths.window, read, predict, with_scale=with_scale, on_window=bar.update
            )
        edges += more
    tried: list[Loop] = []
    wanted = candidates(parts, features, lengths.window) if loops else []
    windows = made((f"loop_{n:05d}", partial(_over_both, one, parts, seen, read)) for n, one in enumerate(wanted))
    with counted(len(wanted), "loop", shown=progress and bool(wanted), desc="loops") as bar:
        for one, window in zip(wanted, windows, strict=True):
            loop, edge = try_loop(one, window, parts, read, with_scale=with_scale)
            tried.append(loop)
            edges += [] if edge is None else [edge]
            bar.set_postfix(closed=sum(loop.closed for loop in tried))
            bar.update()
    return join(parts, edges, tried, cuts, read, with_scale=with_scale, wide=widened)


def _over(frames: range, parts: Sequence[Part], seen: Progress, store: Store) -> Seen:
    """The input of a wide window, from frames of several windows."""
    pixels: list[Tensor] = []
    valid: list[Tensor] = []
    for number, own in groupby(frames, partial(owner, parts)):
        window = parts[number].window
        rows = [frame - seen.spans[window][0] for frame in own]
        for kept, one in zip((pixels, valid), store.pixels(seen.names[window], rows), strict=True):
            kept.append(one)
    transforms = [seen.frames[frame].transform for frame in frames]
    return Seen(frames.start, [], transforms, torch.cat(pixels), torch.cat(valid))


def _over_both(one: Candidate, parts: Sequence[Part], seen: Progress, read: Callable[[int], Window]) -> Seen:
    """The input of a loop's window, from the frames of both halves."""
    pixels, valid, transforms = [], [], []
    for number, (start, stop) in zip(one.parts, one.halves, strict=True):
        window = read(parts[number].window)
        rows = parts[number].rows(window, start, stop)
        pixels.append(window.pixels[rows])
        valid.append(window.valid[rows])
        transforms += [frame.transform for frame in seen.frames[start:stop]]
    return Seen(0, [], transforms, torch.cat(pixels), torch.cat(valid))


@contextmanager
def _kept(store: Store) -> Iterator[None]:
    """Add to errors which windows are kept."""
    try:
        yield
    except (UserError, OSError) as error:
        count = len(list(store.folder.glob("window_*.safetensors")))
        if not count:
            store.remove()
            raise
        kind = DiskFull if isinstance(error, DiskFull) else UserError if isinstance(error, UserError) else OSError
        # With wrong input the same call would fail in the same way.
        goes_on = "" if kind is UserError else "; the same call resumes from there"
        raise kind(f"{error}; {count} finished windows are kept in {store.folder}{goes_on}") from error
