"""Checks of a ``reconstruct`` command before its model is loaded."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from geoaccel import export
from geoaccel.api import check_methods
from geoaccel.attention_kernels import KERNELS
from geoaccel.console import expand, say
from geoaccel.edges import check_edge_filter
from geoaccel.errors import UserError
from geoaccel.finished_scenes import FILES, made_of, of_scene, require_same
from geoaccel.images import VIDEO_SUFFIXES, check_file, find_masks
from geoaccel.images.calibration import cameras_of, read_numbers
from geoaccel.images.documents import matched, read_document
from geoaccel.images.given import depth_folder, find_depths, read_poses, read_steps
from geoaccel.images.load import or_leave_out
from geoaccel.images.positions import match_positions
from geoaccel.images.sources import FilePicture, Picture, list_pictures
from geoaccel.inputs import check_size
from geoaccel.memory import read_size
from geoaccel.merging.layers import read_layers
from geoaccel.models.files import list_models
from geoaccel.point_cloud import check_max_points
from geoaccel.priors import read_distance
from geoaccel.reconstruction import check_choices
from geoaccel.reference import check_reference
from geoaccel.refine import check_refine, check_tracks
from geoaccel.scene import check_conf_percentile
from geoaccel.tuned import TunedPlan

VIDEO_FPS = 2.0  # if the user chooses nothing


@dataclass(frozen=True)
class Job:
    """One scene to reconstruct.

    Attributes:
        inputs: As given on the command line.
        out: Output folder.
        pictures: Images found; none is read yet.
        fps: Frames per second of a video.
        made_of: Everything that determines its files; None for a scene without ``--scenes``.
        before: The same for a finished scene in the output folder; only its model may differ.
    """

    inputs: list[str]
    out: Path
    pictures: list[Picture]
    fps: float | None
    made_of: Mapping[str, Any] | None = None
    before: Mapping[str, Any] | None = None

    def with_model(self, model: Mapping[str, Any]) -> Job:
        """The job with its model, as `geoaccel.finished_scenes.of_model` describes it.

        Raises:
            FileExistsError: The finished scene was made by another model.
        """
        if self.made_of is None:
            return self
        if self.before is not None:
            require_same(self.out, self.before, model)
        return replace(self, made_of={**model, **self.made_of})


def check_options(args: argparse.Namespace, merging: Sequence[str]) -> list[str]:
    """Refuse options that are wrong for any input and model, and return the formats.

    Raises:
        ValueError: For the first wrong option.
    """
    if not args.out.strip():
        raise UserError("--out is empty; name the output folder (. is the current one)")
    # An empty name would mean the current folder; shells pass one for an unset variable.
    for name in ("model", *FILES):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise UserError(f"--{name} is empty; give a value, or leave it out")
    formats = export.read_formats(args.formats)
    check_methods(merging=merging, quantization=args.quantization, attention=args.attention)
    read_layers(args.layers)
    if args.plan is not None:
        TunedPlan.read(args.plan)
    if args.compare is not None and not (merging or args.quantization or args.layers or args.plan):
        raise UserError("--compare dense needs an accelerated model; add --merging, --quantization, --layers or --plan")
    check_conf_percentile(args.conf_percentile)
    check_max_points(args.max_points)
    check_edge_filter(args.edge_filter)
    check_refine(args.refine)
    check_tracks(args.tracks)
    args.reference = int(args.reference) if args.reference.isdecimal() else args.reference
    check_reference(args.reference)
    check_size(args.size)
    if args.max_memory is not None:
        read_size(args.max_memory, "--max-memory")
    check_choices(
        args.points,
        intrinsics=args.intrinsics,
        shared_camera=args.shared_camera,
        square_pixels=args.square_pixels,
        refine=args.refine,
        poses=args.poses,
        scale=args.scale,
        positions=args.positions,
    )
    if args.max_frames is not None and args.max_frames < 1:
        raise UserError(f"max_frames={args.max_frames} (--max-frames); it must be at least 1")
    if args.intrinsics is not None and read_numbers(args.intrinsics) is None:
        read_document(args.intrinsics, one_camera=True)
    if args.poses is not None:
        read_document(args.poses)
    if args.depths is not None:
        depth_folder(args.depths)
    return formats


def check_kernel(name: str | None, device: str, dtype: str) -> None:
    """Refuse an attention kernel that does not run here, by running it on a few numbers.

    Raises:
        ImportError: Its package is missing.
        ValueError: It does not support this device or dtype.
    """
    if name is not None:
        some = torch.ones(1, 2, 4, 32, device=device, dtype=getattr(torch, dtype))
        KERNELS[name](some, some, some, None)


def check_jobs(args: argparse.Namespace, formats: Sequence[str], *, writes: bool = True) -> list[Job]:
    """Find the images of every scene, and refuse options that do not fit them; no image is read.

    Args:
        args: Command-line options.
        formats: Names of formats.
        writes: This process writes the result; otherwise output folders are not checked.

    Raises:
        ValueError: If there are no images, or an option does not fit them.
        OSError: If a file is missing, or would be overwritten.
    """
    out = expand(args.out)
    if not args.scenes:
        return [_check_job(args, formats, args.input, out, writes)]
    names = [Path(name).resolve().name if Path(name).is_dir() else Path(name).stem for name in args.input]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two scenes would be written to {out / twice}; reconstruct one of them in a separate run")
    if all(Path(name).is_file() and not _is_video(name) for name in args.input):
        raise UserError("each INPUT of --scenes must be a folder, pattern or video; leave out --scenes for one scene")
    pairs = zip(args.input, names, strict=True)
    return [_check_job(args, formats, [given], out / name, writes) for given, name in pairs]


def _check_job(args: argparse.Namespace, formats: Sequence[str], given: list[str], out: Path, writes: bool) -> Job:
    fps = args.fps
    if len(given) > 1 and (video := next((name for name in given if _is_video(name)), None)) is not None:
        raise UserError(
            f"{video} is a video and cannot be combined with other inputs; give it alone, or use --scenes to make "
            "each INPUT its own scene"
        )
    if args.fps is None and args.max_frames is None and _is_video(given[0]):
        fps = VIDEO_FPS
        if writes:
            say(f"taking {VIDEO_FPS:g} frames per second of the video; change this with --fps or --max-frames")
    named = _named_files(args, given)
    before = made_of(out) if args.scenes and not args.overwrite else None
    if writes and before is None and any(_is_video(name) for name in given):  # opening it takes a while
        export.check_output_folder(out, overwrite=args.overwrite, needed=named)
    source = given[0] if len(given) == 1 else given
    pictures = list_pictures(source, fps, args.max_frames, recursive=args.recursive)
    scene = of_scene(args, formats, pictures) if args.scenes else None
    if before is not None and scene is not None:
        require_same(out, before, scene)
        return Job(given, out, pictures, fps, scene, before)
    names = [picture.name for picture in pictures]
    files = [picture.path for picture in pictures if picture.path is not None]
    masks = find_masks(expand(args.masks), names) if args.masks else []
    # Folders of an earlier result with inputs that are read again; and every image, since a folder may hold links.
    if writes:
        export.check_output_folder(out, overwrite=args.overwrite, needed=named, inputs=[*files, *masks])
    if args.window is None and isinstance(args.reference, int):
        check_reference(args.reference, len(pictures))
    if not args.scenes:  # with --scenes, an error in one scene does not stop the others
        _check_given(args, pictures, names)
    export.check_names(names, formats)
    export.check_images(args.images, formats, [(picture.name, picture.path) for picture in pictures], out, masks)
    if args.scale is not None:
        read_distance(args.scale, names)
    if args.positions is not None:
        match_positions(args.positions, names)
    return Job(given, out, pictures, fps, scene)


def _check_given(args: argparse.Namespace, pictures: Sequence[Picture], names: Sequence[str]) -> None:
    """Refuse photographs by their file headers, and files of conditions that belong to other photographs."""
    if not args.skip_bad:
        for picture in pictures:
            if isinstance(picture, FilePicture):
                try:
                    check_file(picture.path)
                except UserError as error:
                    raise or_leave_out(error, len(pictures)) from error
    if args.poses is not None:
        matched(read_poses(read_document(args.poses)), names, args.poses)
    if args.intrinsics is not None and read_numbers(args.intrinsics) is None:
        matched(cameras_of(read_document(args.intrinsics, one_camera=True), names), names, args.intrinsics)
    if args.depths is not None:
        folder = depth_folder(args.depths)
        read_steps(folder, find_depths(folder, names))


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def _named_files(args: argparse.Namespace, given: Sequence[str]) -> list[Path]:
    """Input files named on the command line, except photographs and masks."""
    found = [Path(path) for name in given if _is_video(name) for path in (glob.glob(name) or [name])]
    named = [getattr(args, name) for name in FILES if name != "masks"]
    found += [expand(path) for path in named if path is not None]
    return found + ([] if args.model in list_models() else [expand(args.model)])
