"""Windows as they come: frames are read, predicted and kept on disk, one window after the other."""

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
"""Frames of a window that ``auto`` takes where memory allows more: attention takes time by their square."""
FEWEST = 4
"""Frames of a window."""
FREE_SHARE = 0.8
"""Of the free memory, that ``auto`` fills."""


@dataclass(frozen=True)
class Lengths:
    """How a sequence is cut into windows.

    Attributes:
        window: Frames that one forward sees.
        overlap: Frames that come again in the next window.
    """

    window: int
    overlap: int

    @property
    def step(self) -> int:
        """Frames that come new with every window but the first."""
        return self.window - self.overlap

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """First and last + 1 image that comes new with every window."""
        first = [(0, min(self.window, count))]
        return first + [(start, min(start + self.step, count)) for start in range(self.window, count, self.step)]


def check_lengths(
    window: int | str,
    overlap: int | None,
    frames: int | None = None,
    *,
    called: tuple[str, str] = ("--window", "--overlap"),
) -> None:
    """Refuse windows that cannot be.

    Args:
        window, overlap: As they were asked for.
        frames: Of the sequence, where it is known.
        called: What the two are called where they were given.

    Raises:
        UserError: Saying what can.
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
            f"overlap={overlap} ({again}) leaves no new frame to a window of {window}; give at most {window - 1}, "
            f"or leave it out for {window // 2}"
        )


def lengths_for(
    model: nn.Module,
    window: int | str,
    overlap: int | None,
    size: tuple[int, int],
    limit: Limit | None = None,
) -> Lengths:
    """Window and overlap as they were asked for; ``auto`` takes what fits into the free memory, at most `MOST_AUTO`.

    Args:
        model: On its device.
        window: A number, or ``auto``.
        overlap: None: a half of the window.
        size: (H, W) of the network input.
        limit: What memory was asked for.

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
    """How a forward on so many frames keeps within the memory; as `check_memory`, which raises where it cannot."""
    return check_memory(model, frames=frames, size=size, limit=limit)


def window_name(number: int) -> str:
    """Of its file."""
    return f"window_{number:05d}"


@dataclass
class Progress:
    """What is known of a sequence when all windows are on disk.

    Attributes:
        names: Of the windows' files.
        spans: First and last + 1 frame of each.
        frames: Of the sequence.
        features: Of each window; None where the network shows none.
        left_out: Images that were left out, and why.
    """

    names: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    features: list[Tensor | None] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, store: Store, name: str) -> None:
        """Take in a window that is on disk."""
        frames, features, start, stop = store.about(name)
        self.names.append(name)
        self.spans.append((start, stop))
        self.frames += frames
        self.features.append(features)
        self.left_out |= store.left_out(name)


@dataclass(frozen=True)
class Predictor:
    """Makes windows of pixels: plain data, so that it can be sent to where a model is.

    Attributes:
        reference: The anchor of each window: ``auto`` or ``first``.
        edge_filter: As of :func:`geoaccel.reconstruct`.
        plan: How a forward keeps within the memory that there is.
    """

    reference: Reference = "auto"
    edge_filter: float | None = None
    plan: MemoryPlan | None = None

    def __call__(self, model: Any, seen: Seen) -> Window:
        """Predict one window, without its pixels: whoever asks has them."""
        give_back_freed_memory()  # of the windows before
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
        pictures: Of the whole sequence, in order.
        preprocess: Of the network.
        lengths: Of windows.
        predictor: Makes them.
        workers: Keep the model: this process, or others that read and predict several windows at a time.
        store: Keeps them.
        done: Takes in what is done.
        skip_bad: Leave out images that cannot be read.
        on_window: Called after each, with how many images are done.

    Raises:
        UserError: An image cannot be read, or is of another size than the first one; what is finished is kept.
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
        raise UserError(f"none of the {len(pictures)} images can be used")
