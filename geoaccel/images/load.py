"""Reads images and converts them to the network input; records how each maps back to its original."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.images.read import picture_size, pictures_in
from geoaccel.images.resize import MAX_ELONGATION, SHARED, Fitted, check_preprocess, fit, pad_to, shared_size
from geoaccel.images.sources import FilePicture, ImageSource, Picture, list_pictures
from geoaccel.images.threads import PIXELS_AT_ONCE, Room, in_order
from geoaccel.images.transform import ImageTransform

logger = logging.getLogger(__name__)

MAX_AREA_RATIO = 16.0
"""Largest ratio of pixel counts within one reconstruction: four times the side."""

MAX_ASPECT_RATIO = {"crop": 3.2, "budget": 2.0, "long": 2.0, "pad": float("inf")}
"""Largest ratio of aspects (W/H) within one reconstruction. ``crop`` allows 16:9 with 9:16, that is 3.16;
``budget`` and ``long`` stretch every image to the first one's aspect; ``pad`` keeps any aspect."""

_MAX_STRETCH = 1.02


class NoneUsable(UserError):
    """None of several images can be used; `left_out` says why for each one."""

    def __init__(self, message: str, left_out: dict[str, str]) -> None:
        super().__init__(message)
        self.left_out = left_out


_MANY_FRAMES = 200


@dataclass(repr=False)
class ImageBatch:
    """Images of one reconstruction.

    Attributes:
        images: [S, 3, H, W] float32 in [0, 1], on the CPU.
        names: Unique file names; those of video frames and arrays are generated and end in ``.png``.
        paths: Image file of each frame; None for arrays and for frames of a video.
        transforms: Photograph to network input, one per image.
        opaque: bool [H, W] of each image, False where it is transparent; None if it is fully opaque.
        left_out: Name of each image that was left out with ``skip_bad``, and why.
        numbers: Of each image among those given, from 0; empty where none was left out.
    """

    images: Tensor
    names: list[str]
    paths: list[Path | None]
    transforms: list[ImageTransform]
    opaque: list[Tensor | None]
    _pictures: list[Picture] = field(repr=False)
    left_out: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ImageBatch of {len(self)} images, {list(self.images.shape)}, first {self.names[0]}"

    @property
    def valid_mask(self) -> Tensor:  # [S, H, W] bool
        """True where the network input shows an image, False at padding and where the image is transparent."""
        masks = [transform.valid_mask() for transform in self.transforms]
        return torch.stack([m if kept is None else m & kept for m, kept in zip(masks, self.opaque, strict=True)])

    def original(self, index: int) -> Tensor:  # [H0, W0, 3] uint8
        """Read one image again, upright RGB at its full resolution. Fastest in ascending order for videos."""
        picture, expected = self._pictures[index], self.transforms[index].original_size
        image = picture.read()
        if (image.height, image.width) != expected:
            raise UserError(
                f"{picture.name} is now {image.width}x{image.height}, but was {expected[1]}x{expected[0]} when it was "
                f"loaded; load the images again"
            )
        return torch.from_numpy(np.array(image.convert("RGB")))


def load_images(
    source: ImageSource,
    preprocess: Preprocess = Preprocess(),  # noqa: B008 (frozen)
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    recursive: bool = False,
    skip_bad: bool | None = None,
    progress: bool = False,
    fits: Callable[..., object] | None = None,
) -> ImageBatch:
    """Read images and convert them to the input size of a backbone.

    Images are rotated upright (EXIF), composited on white where transparent, and converted to 8 bit; then cropped,
    padded or resized exactly as the backbone's authors do. Every image is resized right after decoding: originals are
    not kept. Files are decoded in threads; results and errors are the same as when reading one by one. The network sees
    transparent areas (around a cut-out) as white, and nothing is reconstructed there.

    Args:
        source: Folder (its images in natural order, or those of its subfolder ``images``), image file, pattern such as
            ``photos/*.jpg``, video file, or a list of paths, PIL images, arrays [H, W, 3] and tensors [3, H, W] (kept
            in the list's order). Arrays are uint8, uint16 or floating point in [0, 1]; they are not copied.
        preprocess: The backbone's preprocessing.
        fps: Frames per second to take from a video; all of them by default.
        max_frames: Upper bound on the number of images; more are subsampled evenly.
        recursive: Search the subfolders of a folder, too.
        skip_bad: Leave out images that cannot be read or are too small or too long, instead of raising. False: the
            error names this option; None: it does not, because the caller has none.
        progress: Show a progress bar.
        fits: Called after the first image with ``frames``, their number, and ``size``, (H, W) of the network input;
            raises if they do not fit into memory.

    Returns:
        The images, with the transform of each.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: There are no images, one cannot be read, or they do not belong together; one line says which.

    Example:
        >>> batch = load_images([np.zeros((60, 80, 3), np.uint8)], Preprocess(size=112))
        >>> list(batch.images.shape), batch.transforms[0].content_box
        ([1, 3, 84, 112], (0, 0, 112, 84))
    """
    check_preprocess(preprocess)
    pictures = list_pictures(source, fps, max_frames, recursive=recursive)
    if len(pictures) > _MANY_FRAMES and fps is None and max_frames is None:
        logger.warning("%d images; use fps or max_frames to take fewer", len(pictures))

    fitted, left_out = _fitted(pictures, preprocess, progress=progress, fits=fits, skip_bad=skip_bad)
    kept = [number for number, picture in enumerate(pictures) if picture.name not in left_out]
    pictures = [pictures[number] for number in kept]

    sizes = [one.transform.network_size for one in fitted]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if len(set(sizes)) > 1:
        logger.info("images of %d shapes are padded with white to %dx%d", len(set(sizes)), width, height)
    images = torch.empty(len(fitted), 3, height, width)
    transforms, opaque = [], []
    for i, one in enumerate(fitted):
        padded = pad_to(one, height, width)
        torch.div(padded.pixels, 255, out=images[i])
        transforms.append(padded.transform)
        opaque.append(padded.opaque)
    if cut_out := sum(kept is not None for kept in opaque):
        logger.info("%d of %d images are transparent in places; nothing is reconstructed there", cut_out, len(opaque))
        shown = zip(pictures, opaque, strict=True)
        if empty := [picture.name for picture, kept in shown if kept is not None and not kept.any()]:
            logger.warning("%d of %d images are transparent everywhere, first %s", len(empty), len(opaque), empty[0])
    return ImageBatch(
        images=images,
        names=[picture.name for picture in pictures],
        paths=[picture.path for picture in pictures],
        transforms=transforms,
        opaque=opaque,
        _pictures=pictures,
        left_out=left_out,
        numbers=kept if left_out else [],
    )


def _fitted(
    pictures: list[Picture],
    preprocess: Preprocess,
    *,
    progress: bool,
    fits: Callable[..., object] | None,
    skip_bad: bool | None,
) -> tuple[list[Fitted], dict[str, str]]:
    """Images at the size of the network input, and why others are left out; files in parallel after the first.

    Errors of an image are raised, or recorded as the reason, in order.
    """
    check, room = _SizeCheck(preprocess), Room(PIXELS_AT_ONCE)
    budget: tuple[int, int] | None = None
    fitted: list[Fitted] = []
    left_out: dict[str, str] = {}
    several: set[str] = set()

    def read(picture: Picture) -> tuple[tuple[int, int], Fitted] | UserError:
        nonlocal budget
        with ExitStack() as held:

            def before(image: Image.Image) -> None:
                held.enter_context(room.held(image.width * image.height))
                if pictures_in(image) > 1:
                    several.add(picture.name)

            try:
                image = picture.read(before) if isinstance(picture, FilePicture) else picture.read()
                check.alone(picture, image.size)
            except UserError as error:
                return error
            if budget is None and preprocess.mode in SHARED:  # the first usable one, read before the others
                budget = shared_size(image.height, image.width, preprocess)
            return image.size, fit(image, preprocess, budget)

    def take(picture: Picture, found: tuple[tuple[int, int], Fitted] | UserError) -> None:
        if isinstance(found, UserError):
            if not skip_bad:
                raise found if skip_bad is None else or_leave_out(found, len(pictures))
            left_out[picture.name] = str(found)
            return
        check.add(picture, found[0])
        fitted.append(found[1])
        if fits is not None and len(fitted) == 1:
            fits(frames=len(pictures), size=found[1].transform.network_size)

    shown = iter(_bar(pictures, progress))
    while not fitted and (picture := next(shown, None)) is not None:
        take(picture, read(picture))
    rest = pictures[len(fitted) + len(left_out) :]
    # A video has one decoder, and an object of the user may be in the list twice.
    with closing(in_order(rest, read, in_threads=lambda one: isinstance(one, FilePicture))) as others:
        for picture in shown:
            take(picture, next(others))
    if not fitted:
        first, why = next(iter(left_out.items()))
        raise NoneUsable(f"none of the {len(pictures)} images can be used; first {first}: {why}", left_out)
    check.report()
    if names := [picture.name for picture in pictures if picture.name in several]:
        what = "%d of %d files are animations or have several pages, first %s; only the first image of each is used"
        logger.warning(f"{what}; save the others as separate files", len(names), len(pictures), names[0])
    return fitted, left_out


def or_leave_out(error: UserError, images: int) -> UserError:
    """The error of one of several images, with the hint that it may be left out."""
    way_out = ", or leave out such images (--skip-bad, skip_bad=True)" if images > 1 else ""
    return UserError(f"{error}{way_out}")


def check_file(path: Path) -> None:
    """Refuse a file that no network can use, by its header; its pixels are not decoded.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is not an image, or too elongated.
    """
    _check_elongation(str(path), picture_size(path))


def _check_elongation(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise UserError(
            f"image {name} is {width}x{height}; one side may be at most {MAX_ELONGATION} times the other; "
            f"crop it or remove it"
        )


class _SizeCheck:
    """Refuses images that do not fit into one reconstruction, as soon as the first one appears."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._mode, self._min_side = preprocess.mode, preprocess.patch_size
        self._first_aspect: float | None = None
        self._widest = self._narrowest = self._largest = self._smallest = ("", 0, 0)
        self._stretched = self._count = 0

    def alone(self, picture: Picture, size: tuple[int, int]) -> None:
        """Refuse an image of size (W, H) that cannot be used whatever the others are."""
        name, (width, height) = _name(picture), size
        if min(width, height) < self._min_side:
            raise UserError(
                f"image {name} is {width}x{height}; each side needs at least {self._min_side} pixels (one patch); "
                f"use a larger image"
            )
        _check_elongation(name, size)

    def add(self, picture: Picture, size: tuple[int, int]) -> None:
        """Compare one image with those before it."""
        self._count += 1
        aspect, this = size[0] / size[1], (_name(picture), *size)
        if self._first_aspect is None:
            self._first_aspect = aspect
            self._widest = self._narrowest = self._largest = self._smallest = this
        self._stretched += not 1 / _MAX_STRETCH <= aspect / self._first_aspect <= _MAX_STRETCH
        self._widest = max(self._widest, this, key=_aspect)
        self._narrowest = min(self._narrowest, this, key=_aspect)
        self._largest = max(self._largest, this, key=_area)
        self._smallest = min(self._smallest, this, key=_area)

        allowed = MAX_ASPECT_RATIO[self._mode]
        if _aspect(self._widest) > allowed * _aspect(self._narrowest):
            raise UserError(
                f"images differ too much in shape: {_describe(self._widest)} and {_describe(self._narrowest)}; their "
                f"aspect ratios may differ by a factor of {allowed:g}; pad them (--mode pad, in Python "
                f"Preprocess(mode='pad')), remove one kind, or crop them to match"
            )
        if _area(self._largest) > MAX_AREA_RATIO * _area(self._smallest):
            raise UserError(
                f"images differ too much in size: {_describe(self._largest)} and {_describe(self._smallest)}; the "
                f"largest may have {MAX_AREA_RATIO:g} times the pixels of the smallest; remove one kind, or resize them"
            )

    def report(self) -> None:
        """Log once what ``budget`` and ``long`` did to images of another aspect."""
        if self._mode in SHARED and self._stretched:
            logger.warning(
                "%s stretches %d of %d images to the aspect of the first one (from %s to %s); --mode pad does not",
                self._mode,
                self._stretched,
                self._count,
                _describe(self._narrowest),
                _describe(self._widest),
            )


def _name(picture: Picture) -> str:
    return str(picture.path or picture.name)


def _aspect(image: tuple[str, int, int]) -> float:
    return image[1] / image[2]


def _area(image: tuple[str, int, int]) -> int:
    return image[1] * image[2]


def _describe(image: tuple[str, int, int]) -> str:
    return f"{image[0]} ({image[1]}x{image[2]})"


def _bar(pictures: list[Picture], progress: bool) -> Iterable[Picture]:
    if not progress:
        return pictures
    from tqdm import tqdm

    return tqdm(pictures, desc="reading images", unit="image")
