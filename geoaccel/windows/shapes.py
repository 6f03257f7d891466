"""All frames of a windowed run have one shape; others are found before anything is predicted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

import numpy as np
from PIL import Image
from torch import Tensor

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.images.load import MAX_AREA_RATIO, or_leave_out
from geoaccel.images.read import size_upright, upright_size
from geoaccel.images.resize import network_size
from geoaccel.images.sources import FilePicture, MemoryPicture, Picture
from geoaccel.images.threads import in_order
from geoaccel.windows.store import Frame

logger = logging.getLogger(__name__)

STRETCH = 1.02
"""Largest ratio of aspects at which two frames count as the same shape."""

AREA = MAX_AREA_RATIO**0.5
"""Largest ratio of pixels between a frame and the usual one, so that any two of them may share a window."""

RULE = "with windows all frames must have one shape"

NAMED = 3
"""Most images of a different shape that an error names."""

Size = tuple[int, int]
"""(W, H)."""


def of_one_shape(
    pictures: Sequence[Picture], preprocess: Preprocess, *, skip_bad: bool
) -> tuple[list[Picture], dict[str, str]]:
    """The images of the most common shape.

    Only file headers are read, so that thousands take seconds. Video frames and the like stay, and so do damaged files
    if they may be left out: their error is reported when they are read.

    Args:
        pictures: Images of the sequence.
        preprocess: Their preprocessing.
        skip_bad: Leave out the others.

    Returns:
        The images, and why each of the others is left out.

    Raises:
        FileNotFoundError: An image does not exist.
        UserError: Some have a different shape or an unreadable header, and `skip_bad` is not set.
    """
    with closing(in_order(pictures, _size, in_threads=lambda one: isinstance(one, FilePicture))) as found:
        sizes: list[Size | None] = []
        for size in found:
            if isinstance(size, UserError) and not skip_bad:
                raise or_leave_out(size, len(pictures))
            sizes.append(None if isinstance(size, UserError) else size)
    counts = Counter(size for size in sizes if size is not None)
    if len(counts) < 2:
        return list(pictures), {}
    usual = counts.most_common(1)[0][0]
    other = [i for i, size in enumerate(sizes) if size is not None and not _alike(size, usual, preprocess)]
    if not other:
        return list(pictures), {}
    like = pictures[sizes.index(usual)].name
    if not skip_bad:
        named = [f"{pictures[i].name} is {_times(sizes[i])}" for i in other[:NAMED]]
        named += [f"{len(other) - NAMED} more have other shapes"] if len(other) > NAMED else []
        text = f"{', '.join(named)}, {like} is {_times(usual)}: {RULE}; crop or resize them to match"
        raise or_leave_out(UserError(text), len(pictures))
    why = {pictures[i].name: f"it is {_times(sizes[i])}, {like} is {_times(usual)}; {RULE}" for i in other}
    words = "%d of %d images are left out because their shape differs, first %s"
    logger.warning(words, len(other), len(pictures), pictures[other[0]].name)
    return [picture for picture in pictures if picture.name not in why], why


def check_sizes(frames: Sequence[Frame]) -> None:
    """Refuse a frame whose shape differs from that of the first one."""
    first = frames[0]
    for frame in frames[1:]:
        size, usual = (one.transform.original_size[::-1] for one in (frame, first))
        # The first one may be at one end of what `_alike` allows, and a later one at the other.
        if frame.transform.network_size != first.transform.network_size or not _one_aspect(size, usual, STRETCH**2):
            raise UserError(
                f"{frame.name} is {_times(size)}, {first.name} is {_times(usual)}: {RULE}; crop or resize them to "
                "match, or reconstruct them separately"
            )


def _size(picture: Picture) -> Size | UserError | None:
    """Size of an image, upright; None if it is only known once read; the error for an unreadable file."""
    if isinstance(picture, FilePicture):
        try:
            return upright_size(picture.path)
        except UserError as error:
            return error
    if not isinstance(picture, MemoryPicture):
        return None
    data = picture.data
    if isinstance(data, Image.Image):
        return size_upright(data)
    sides = data.shape[-2:] if isinstance(data, Tensor) else np.shape(data)[:2]
    return (int(sides[1]), int(sides[0])) if len(sides) == 2 and min(sides) > 0 else None


def _alike(size: Size, usual: Size, preprocess: Preprocess) -> bool:
    area = size[0] * size[1] / (usual[0] * usual[1])
    if not _one_aspect(size, usual, STRETCH) or not 1 / AREA <= area <= AREA:
        return False
    # In modes with a shared size, too: it is that of the first image of a window, which may be any of them.
    return network_size(*size[::-1], preprocess) == network_size(*usual[::-1], preprocess)


def _one_aspect(size: Size, usual: Size, stretch: float) -> bool:
    return 1 / stretch < size[0] / size[1] * usual[1] / usual[0] < stretch


def _times(size: Size | None) -> str:
    assert size is not None
    return f"{size[0]}x{size[1]}"
