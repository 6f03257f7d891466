"""The frames of a sequence as a stream: chunks that are read, and the pixels of each window.

Each window repeats the last frames of the one before. They are kept in memory, or read from the earlier window if that
is already on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geoaccel.backbone import Preprocess
from geoaccel.images import ImageTransform, load_images
from geoaccel.images.load import NoneUsable
from geoaccel.images.sources import Picture
from geoaccel.windows.shapes import check_sizes
from geoaccel.windows.store import Frame, Store, Window


@dataclass(frozen=True, eq=False)
class Chunk:
    """The n new frames of a window.

    Attributes:
        names: Names of their images.
        transforms: From the images to the network input.
        pixels: Network input [n, 3, H, W], uint8.
        valid: True where it shows the image [n, H, W].
        left_out: Images that cannot be used, and why.
    """

    names: list[str]
    transforms: list[ImageTransform]
    pixels: Tensor
    valid: Tensor
    left_out: dict[str, str]

    def __len__(self) -> int:
        return len(self.names)


def read_chunk(pictures: Sequence[Picture], preprocess: Preprocess, skip_bad: bool) -> Chunk:
    """Read images.

    Raises:
        FileNotFoundError: A file is missing on this machine; this never counts as a bad image.
        UserError: An image cannot be read.
    """
    try:
        batch = load_images(list(pictures), preprocess, skip_bad=skip_bad)
    except NoneUsable as error:
        return Chunk([], [], torch.empty(0, 3, 0, 0), torch.empty(0, 0, 0), error.left_out)
    pixels = (batch.images * 255).round().to(torch.uint8)
    return Chunk(batch.names, batch.transforms, pixels, batch.valid_mask, batch.left_out)


@dataclass(frozen=True, eq=False)
class Seen:
    """The input of one window: F frames.

    Attributes:
        start: Index of the first one in the sequence.
        frames: The new frames.
        transforms: Transforms of all frames.
        pixels: Network input [F, 3, H, W], uint8.
        valid: True where it shows the image [F, H, W].
    """

    start: int
    frames: list[Frame]
    transforms: list[ImageTransform]
    pixels: Tensor
    valid: Tensor

    def whole(self, window: Window) -> Window:
        """A predicted window completed with its frames and pixels."""
        return replace(window, frames=self.frames, pixels=self.pixels, valid=self.valid)


@dataclass
class Line:
    """Consecutive frames, the last of which each window repeats.

    Attributes:
        number: Index of each image of the sequence, by name.
        overlap: Frames shared with the next window.
        first: First frame of the sequence.
        count: Frames so far.
    """

    number: Mapping[str, int]
    overlap: int
    first: Frame | None = None
    count: int = 0
    _last: list[Frame] = field(default_factory=list)
    _pixels: tuple[Tensor, Tensor] | tuple[Store, str] | None = None

    def pass_by(self, store: Store, name: str) -> None:
        """Add the frames of a window that is on disk."""
        self._take(store.about(name)[0])
        self._pixels = (store, name)

    def next_window(self, chunk: Chunk) -> Seen:
        """The input of the window with these new frames.

        Raises:
            UserError: If a frame differs in shape from the first one.
        """
        frames = [Frame(n, self.number[n], t) for n, t in zip(chunk.names, chunk.transforms, strict=True)]
        check_sizes(([self.first] if self.first is not None else []) + frames)
        shared, again = list(self._last), self._shared()
        pixels = chunk.pixels if again is None else torch.cat([again[0], chunk.pixels])
        valid = chunk.valid if again is None else torch.cat([again[1], chunk.valid])
        seen = Seen(self.count - len(shared), frames, [frame.transform for frame in [*shared, *frames]], pixels, valid)
        self._take(frames)
        keep = len(self._last)
        self._pixels = (pixels[-keep:].clone(), valid[-keep:].clone()) if keep else None
        return seen

    def _take(self, frames: list[Frame]) -> None:
        self.first = self.first or next(iter(frames), None)
        self.count += len(frames)
        self._last = [*self._last, *frames][-self.overlap :]

    def _shared(self) -> tuple[Tensor, Tensor] | None:
        if self._pixels is None:
            return None
        if isinstance(self._pixels[0], Tensor):
            return self._pixels
        store, name = self._pixels
        window = store.read(name)
        keep = len(self._last)
        return window.pixels[-keep:], window.valid[-keep:]
