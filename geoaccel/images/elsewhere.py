"""Images that another process is to read, maybe on another machine: where they are, whatever folder that one is in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from geoaccel.images.sources import FilePicture, Picture, VideoPicture
from geoaccel.images.video import Video


def file_of(picture: Picture) -> Path | None:
    """The file that an image is read from, be it a video; None for an image in memory."""
    return picture.video.path if isinstance(picture, VideoPicture) else picture.path


def absolute(pictures: Iterable[Picture]) -> list[Picture]:
    """The same images by absolute paths; those in memory as they are."""
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
