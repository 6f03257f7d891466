"""Streaming of windows: frames are read, predicted and stored on disk, one window after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from geoaccel.backbone import Preprocess
from geoaccel.conditions import Conditions
from geoaccel.edges import depth_edges
from geoaccel.errors import UserError
from geoaccel.freed_memory import give_back_freed_memory
from geoaccel.images.load import ImageBatch
from geoaccel.images.sources import Picture
from geoaccel.inputs import Inputs
from geoaccel.memory import Limit, check_memory, choose, free_bytes, host_room
from geoaccel.memory_plan import MemoryPlan
from geoaccel.prediction import needed_heads, predict_frames
from geoaccel.reference import Reference
from geoaccel.windows.frames import Chunk, Line, Seen, read_chunk
from geoaccel.windows.store import Frame, Store, Window, ranked
from geoaccel.workers import Here, Task, Workers

MOST_AUTO = 60
"""Most frames of a window for ``auto``, whatever the memory: the time of attention is quadratic in them."""
FEWEST = 4
"""Frames of a window."""
FREE_SHARE = 0.8
"""Fraction of the free memory that ``auto`` fills."""


@dataclass(frozen=True)
class Lengths:
    """Division of a sequence into windows.

    Attributes:
        window: Frames per window.
        overlap: Frames shared with the next window.
    """

    window: int
    overlap: int

    @property
    def step(self) -> int:
        """New frames of every window but the first."""
        return self.window - self.overlap

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """First and last + 1 new image of every window."""
        first = [(0, min(self.window, count))]
        return first + [(start, min(start + self.step, count)) for start in range(self.window, count, self.step)]


def check_lengths(
    window: int | str,
    overlap: int | None,
    frames: int | None = None,
    *,
    called: tuple[str, str] = ("--window", "--overlap"),
) -> None:
    """Refuse impossible windows.

    Args:
        window, overlap: As requested.
        frames: Number of frames of the sequence, if known.
        called: Names of the two options, for messages.

    Raises:
        UserError: Saying what is allowed.
    """
    longer, again = called
    if window != "auto" and (not isinstance(window, int) or isinstance(window, bool) or window < FEWEST):
        raise UserError(f"window={window!r} ({longer}): give auto, or a number of frames from {FEWEST} on")
    if frames is not None and window != "auto" and isinstance(window, int) and window > frames:
        raise UserError(
            f"window={window} ({longer}) is longer than the sequence of {frames} frames; leave it out, or give at most "
            f"{frames}"
        )
    if overlap is not None and (not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 1):
        raise UserError(f"overlap={overlap!r} ({again}): windows are joined by shared frames; give 1 or more")
    if overlap is not None and window != "auto" and isinstance(window, int) and overlap >= window:
        raise UserError(
            f"overlap={overlap} ({again}) leaves no new frames in a window of {window}; give at most {window - 1}, "
            f"or leave it out for {window // 2}"
        )


def lengths_for(
    model: nn.Module,
    window: int | str,
    overlap: int | None,
    size: tuple[int, int],
    limit: Limit | None = None,
) -> Lengths:
    """Window and overlap as requested; ``auto``: what fits into free memory, at most `MOST_AUTO`.

    Args:
        model: On its device.
        window: A number, or ``auto``.
        overlap: None: half of the window.
        size: (H, W) of the network input.
        limit: Requested memory limit.

    Raises:
        UserError: If no window fits, or the overlap does not.
    """
    if window == "auto":
        limit = limit or Limit()
        device = limit.device or next(model.parameters()).device
        room, host = int(FREE_SHARE * limit.room(device, free_bytes(device))), host_room(device)
        counts = range(MOST_AUTO, FEWEST - 1, -1)
        window = next((n for n in counts if choose(model, n, size, limit, room, host=host).fits), FEWEST)
        if window == FEWEST:  # the shortest may fill all of the memory
            try:
                plan_for(model, FEWEST, size, limit)
            except UserError as error:
                raise UserError(
                    f"a window has at least {FEWEST} frames, and {error}; a smaller --size takes less, and without "
                    "--window fewer frames may do"
                ) from error
    assert isinstance(window, int)
    overlap = window // 2 if overlap is None else overlap
    check_lengths(window, overlap)
    return Lengths(window, overlap)


def plan_for(model: nn.Module, frames: int, size: tuple[int, int], limit: Limit) -> MemoryPlan | None:
    """The memory plan for a forward on this many frames, from `check_memory`, which raises if there is none."""
    return check_memory(model, frames=frames, size=size, limit=limit)


def window_name(number: int) -> str:
    """Name of its file."""
    return f"window_{number:05d}"


@dataclass
class Progress:
    """What is known about a sequence from its windows on disk.

    Attributes:
        names: Names of the windows' files.
        spans: First and last + 1 frame of each.
        frames: Frames of the sequence.
        features: Features of each window; None if the network gives none.
        left_out: Images that were left out, and why.
    """

    names: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    features: list[Tensor | None] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, store: Store, name: str) -> None:
        """Add a window that is on disk."""
        frames, features, start, stop = store.about(name)
        self.names.append(name)
        self.spans.append((start, stop))
        self.frames += frames
        self.features.append(features)
        self.left_out |= store.left_out(name)


@dataclass(frozen=True)
class Predictor:
    """Predicts windows from pixels; plain data, so that it can be sent to workers.

    Attributes:
        reference: Reference view of each window: ``auto`` or ``first``.
        edge_filter: As in :func:`geoaccel.reconstruct`.
        plan: Memory plan.
    """

    reference: Reference = "auto"
    edge_filter: float | None = None
    plan: MemoryPlan | None = None

    def __call__(self, model: Any, seen: Seen) -> Window:
        """Predict one window, without its pixels, which the caller has."""
        give_back_freed_memory()  # of earlier windows
        names = [f"frame {seen.start + row}" for row in range(len(seen.pixels))]
        batch = ImageBatch(
            images=seen.pixels.float() / 255,
            names=names,
            paths=[None] * len(names),
            transforms=list(seen.transforms),
            opaque=list(seen.valid),
            _pictures=[],
        )
        heads = needed_heads(model, "depth")
        scene, order = predict_frames(
            model, Inputs(batch, Conditions(), Conditions(), plan=self.plan), heads, "depth", self.reference
        )
        mask = scene.mask
        if self.edge_filter is not None:
            mask = mask & ~depth_edges(scene.depth, mask, self.edge_filter, scene.conf)
        return Window(
            start=seen.start,
            frames=[],
            pixels=seen.pixels[:0].clone(),
            valid=seen.valid[:0].clone(),
            cam_from_world=scene.cam_from_world,
            intrinsics=scene.intrinsics,
            depth=scene.depth,
            rank=ranked(scene.conf, mask),
            features=order.features,
            unit=scene.unit,
        )


def stream(
    pictures: Sequence[Picture],
    preprocess: Preprocess,
    lengths: Lengths,
    predictor: Predictor,
    workers: Here | Workers,
    store: Store,
    done: Progress,
    *,
    skip_bad: bool = False,
    on_window: Callable[[int], object] = lambda images: None,
) -> None:
    """Predict all windows that are not on disk yet.

    Args:
        pictures: Images of the whole sequence, in order.
        preprocess: Preprocessing of the network.
        lengths: Lengths of the windows.
        predictor: Predicts windows.
        workers: Where the model runs: this process, or others that read and predict several windows at a time.
        store: Stores the windows.
        done: Collects the results.
        skip_bad: Leave out images that cannot be read.
        on_window: Called after each window with the number of images done.

    Raises:
        UserError: An image cannot be read, or differs in size from the first one; finished windows are kept.
    """
    spans = lengths.chunks(len(pictures))

    def unread() -> Iterator[Task]:
        for chunk, (start, stop) in enumerate(spans):
            if store.has(window_name(chunk)):
                yield chunk, None
            else:
                yield chunk, (read_chunk, pictures[start:stop], preprocess, skip_bad)

    def unpredicted() -> Iterator[Task]:
        line = Line({picture.name: i for i, picture in enumerate(pictures)}, lengths.overlap)
        for read in workers.in_order(unread(), beside=True):
            if store.has(window_name(read.name)):
                line.pass_by(store, window_name(read.name))
                yield (read.name, None, {}), None
                continue
            chunk: Chunk = read.get()
            seen = line.next_window(chunk) if len(chunk) else None
            yield (read.name, seen, chunk.left_out), None if seen is None else (predictor, seen)

    for predicted in workers.in_order(unpredicted()):
        number, seen, left_out = predicted.name
        if seen is not None:
            store.write(window_name(number), replace(seen.whole(predicted.get()), left_out=left_out))
        if store.has(window_name(number)):
            done.add(store, window_name(number))
        else:  # none of its images can be used
            done.left_out |= left_out
        on_window(spans[number][1])
    if not done.names:
        raise UserError(f"none of the {len(pictures)} images can be used; give other images")
