"""What can be known to be wrong with a ``reconstruct`` command before its model is loaded."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence
from pathlib import Path

from geoaccel import export
from geoaccel.api import check_methods
from geoaccel.edges import check_edge_filter
from geoaccel.errors import UserError
from geoaccel.images import VIDEO_SUFFIXES, find_masks
from geoaccel.images.sources import Picture, list_pictures
from geoaccel.models.files import list_models
from geoaccel.point_cloud import check_max_points
from geoaccel.reference import check_reference
from geoaccel.scene import check_conf_percentile

MIN_IMAGES = 2
VIDEO_FPS = 2.0  # where the user chooses nothing


def check_options(args: argparse.Namespace, merging: Sequence[str]) -> list[str]:
    """Refuse options that are wrong whatever the input and the model are, and return the formats.

    Raises:
        ValueError: For the first one.
    """
    formats = [name.strip() for name in args.formats.split(",") if name.strip()]
    export.check_formats(formats)
    check_methods(merging=merging, quantization=args.quantization, attention=args.attention)
    check_conf_percentile(args.conf_percentile)
    check_max_points(args.max_points)
    check_edge_filter(args.edge_filter)
    args.reference = int(args.reference) if args.reference.isdecimal() else args.reference
    check_reference(args.reference)
    if args.size is not None and args.size < 1:
        raise UserError(
            f"--size {args.size}; it is the width or long side in pixels, a multiple of the model's patches"
        )
    if args.max_frames is not None and args.max_frames < MIN_IMAGES:
        raise UserError(f"--max-frames {args.max_frames}; a reconstruction needs at least {MIN_IMAGES}")
    return formats


def check_input(
    args: argparse.Namespace, out: Path | None, masks: Path | None, formats: Sequence[str]
) -> list[Picture]:
    """Find the images, and refuse what does not go together with them; none is read.

    Args:
        args: Of the command line.
        out: Where to write; None where another process does.
        masks: Folder of masks.
        formats: Of the files.

    Returns:
        The pictures, for `geoaccel.images.load_images`.

    Raises:
        ValueError: If there are too few, or a format cannot hold their names.
        OSError: If one is missing, or would be overwritten.
    """
    source = args.input[0] if len(args.input) == 1 else args.input
    pictures = list_pictures(source, args.fps, args.max_frames)
    if len(pictures) < MIN_IMAGES:
        raise UserError(
            f"got {len(pictures)} image of {' '.join(args.input)}; a reconstruction needs at least two of the same "
            "scene; add images, or raise --fps for a video"
        )
    export.check_names([picture.name for picture in pictures], formats)
    # Again with every image: a folder may hold links.
    read = [picture.path for picture in pictures if picture.path is not None]
    if out is not None:
        export.check_output_folder(out, overwrite=args.overwrite, needed=read)
    if masks is not None:
        find_masks(masks, [picture.name for picture in pictures])
    return pictures


def is_video_without_a_choice(args: argparse.Namespace) -> bool:
    """Whether all frames of a video would be taken, which nobody asked for."""
    return args.fps is None and args.max_frames is None and Path(args.input[0]).suffix.lower() in VIDEO_SUFFIXES


def named_files(args: argparse.Namespace, masks: Path | None) -> list[Path]:
    """Files that the command line names for reading."""
    found = [Path(path) for name in args.input for path in (glob.glob(name) or [name])]
    found += [masks] if masks else []
    found += [Path(path).expanduser() for path in (args.poses, args.intrinsics, args.depths) if path is not None]
    return found + ([] if args.model in list_models() else [Path(args.model).expanduser()])
