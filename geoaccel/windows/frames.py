"""The frames of a sequence as they come: chunks that are read, and the pixels that each window sees.

A window sees the last frames of those before it again. They are kept in memory for that, or read from its window where
that was on disk before.
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
    """Frames that come new with a window, n of them.

    Attributes:
        names: Of their images.
        transforms: From the images to the network input.
        pixels: Network input [n, 3, H, W], uint8.
        valid: Where it shows the image [n, H, W].
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
        FileNotFoundError: One cannot be seen from here; it is not bad, and never left out.
        UserError: One cannot be read.
    """
    try:
        batch = load_images(list(pictures), preprocess, skip_bad=skip_bad)
    except NoneUsable as error:
        return Chunk([], [], torch.empty(0, 3, 0, 0), torch.empty(0, 0, 0), error.left_out)
    pixels = (batch.images * 255).round().to(torch.uint8)
    return Chunk(batch.names, batch.transforms, pixels, batch.valid_mask, batch.left_out)


@dataclass(frozen=True, eq=False)
class Seen:
    """What one window sees: F frames.

    Attributes:
        start: Number of the first one in the sequence.
        frames: That come new.
        transforms: Of all.
        pixels: Network input [F, 3, H, W], uint8.
        valid: Where it shows the image [F, H, W].
    """

    start: int
    frames: list[Frame]
    transforms: list[ImageTransform]
    pixels: Tensor
    valid: Tensor

    def whole(self, window: Window) -> Window:
        """A window that was predicted of this, with its frames and pixels."""
        return replace(window, frames=self.frames, pixels=self.pixels, valid=self.valid)


@dataclass
class Line:
    """Frames in a row, of which every window sees the last ones again.

    Attributes:
        number: Of each image of the sequence, by name.
        overlap: Frames that come again in the next window.
        first: Frame of the sequence.
        count: Frames so far.
    """

    number: Mapping[str, int]
    overlap: int
    first: Frame | None = None
    count: int = 0
    _last: list[Frame] = field(default_factory=list)
    _pixels: tuple[Tensor, Tensor] | tuple[Store, str] | None = None

    def pass_by(self, store: Store, name: str) -> None:
        """Take in the frames of a window that is on disk."""
        self._take(store.about(name)[0])
        self._pixels = (store, name)

    def next_window(self, chunk: Chunk) -> Seen:
        """What the window sees that some frames come new with.

        Raises:
            UserError: One is of another shape than the first of all.
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
