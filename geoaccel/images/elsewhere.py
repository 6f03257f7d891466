"""Images to be read by another process, possibly on another machine: paths independent of the working directory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from geoaccel.images.sources import FilePicture, Picture, VideoPicture
from geoaccel.images.video import Video


def file_of(picture: Picture) -> Path | None:
    """The file that an image is read from, possibly a video; None for an image in memory."""
    return picture.video.path if isinstance(picture, VideoPicture) else picture.path


def absolute(pictures: Iterable[Picture]) -> list[Picture]:
    """The same images with absolute paths; those in memory unchanged."""
    videos: dict[int, Video] = {}
    found: list[Picture] = []
    for picture in pictures:
        if isinstance(picture, FilePicture):
            picture = replace(picture, path=picture.path.absolute())
        elif isinstance(picture, VideoPicture):
            if id(picture.video) not in videos:
                videos[id(picture.video)] = copy.copy(picture.video)
                videos[id(picture.video)].path = picture.video.path.absolute()
            picture = replace(picture, video=videos[id(picture.video)])
        found.append(picture)
    return found
