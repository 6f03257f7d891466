"""Options of ``geoaccel reconstruct``."""

from __future__ import annotations

import argparse

from geoaccel.options.common import MODEL, add_device, add_dtype, add_overwrite
from geoaccel.options.names import (
    ATTENTION,
    ENGINE,
    FORMATS,
    IMAGES,
    MERGING,
    MODES,
    POINTS,
    QUANTIZATION,
    TRACKS,
    USUAL_FORMATS,
    WINDOW_FORMATS,
    listed,
    one_of,
)

EXAMPLES = (
    "geoaccel reconstruct photos/ --model facebook/VGGT-1B --merging asymmetric --out scene/",
    "geoaccel reconstruct clip.mp4 --fps 2 --model yyfz233/Pi3 --formats ply,colmap --out scene/",
    "geoaccel reconstruct walk.mp4 --fps 4 --window auto --model facebook/VGGT-1B --out walk/",
    "geoaccel reconstruct scenes/*/ --scenes --engine ray --ray-address auto --model facebook/VGGT-1B --out results/",
)


def add_reconstruct(rec: argparse.ArgumentParser) -> None:
    """All options of the command."""
    rec.add_argument("input", nargs="+", metavar="INPUT", help="folder of images, image files, glob, or one video")
    rec.add_argument("--out", required=True, help="output folder; new, empty, or with nothing but the images in it")
    _add_model(rec.add_argument_group("model"))
    _add_input(rec.add_argument_group("images"))
    _add_priors(rec.add_argument_group("known cameras, depth and scale"))
    _add_windows(rec.add_argument_group("long sequences"))
    _add_workers(rec.add_argument_group("several machines"))
    _add_output(rec.add_argument_group("result"))


def _add_model(rec: argparse._ActionsContainer) -> None:
    rec.add_argument("--model", default="vggt-mini", help=f"{MODEL} (default: %(default)s)")
    rec.add_argument(
        "--merging",
        metavar="METHOD",
        type=one_of("merging method", MERGING, "merging"),
        help=f"token merging; combine as alike,httm (default: none){listed(MERGING)}",
    )
    rec.add_argument(
        "--quantization",
        metavar="METHOD",
        type=one_of("quantization method", QUANTIZATION, "quantization"),
        help=f"quantization of the weights (default: none){listed(QUANTIZATION)}",
    )
    rec.add_argument(
        "--compare",
        choices=("dense",),
        metavar="dense",
        help="also run the dense model (four forwards in all), and report what the methods gain and change",
    )
    rec.add_argument("--layers", help="methods for single layers, e.g. '{0-8: frame-only, 9-23: httm}', or a preset")
    rec.add_argument("--plan", help="plan from geoaccel tune, instead of --merging, --layers and --quantization")
    rec.add_argument(
        "--attention",
        metavar="KERNEL",
        type=one_of("attention kernel", ATTENTION, "attention"),
        help=f"attention kernel:{listed(ATTENTION)}",
    )
    add_device(rec)
    add_dtype(rec)
    rec.add_argument("--max-memory", metavar="24GB", help="limit for memory on the device (default: what is free)")


def _add_input(rec: argparse._ActionsContainer) -> None:
    rec.add_argument("--fps", type=float, help="frames per second to take from a video (default: 2)")
    rec.add_argument("--max-frames", type=int, help="use at most this many images, evenly spread")
    rec.add_argument("--recursive", action="store_true", help="search the subfolders of a folder, too")
    rec.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and name them")
    rec.add_argument("--scenes", action="store_true", help="each INPUT is a separate scene, written to OUT/its name")
    rec.add_argument(
        "--size", type=int, help="width or long side of the network input in pixels (default: the model's)"
    )
    rec.add_argument(
        "--mode", choices=MODES, metavar="MODE", help=f"how images are resized (default: the model's){listed(MODES)}"
    )
    rec.add_argument(
        "--reference",
        help="reference view: first, auto or an image number from 0 (default: first; in windows: auto)",
    )
    rec.add_argument("--drop-outliers", action="store_true", help="leave out images that are unlike the others")
    rec.add_argument("--masks", help="folder with a mask for each photograph; bright pixels are kept")


def _add_priors(rec: argparse._ActionsContainer) -> None:
    rec.add_argument("--poses", help="known poses: transforms.json or poses.json, for some or all images")
    rec.add_argument(
        "--depths",
        help="folder of known depths: .npy in the unit of the poses, or 16-bit .png in mm (or as scale.json says)",
    )
    rec.add_argument(
        "--intrinsics", help="known intrinsics: f or fx,fy,cx,cy in pixels of the photographs, or a file with them"
    )
    rec.add_argument("--shared-camera", action="store_true", help="all images share one camera")
    rec.add_argument("--square-pixels", action="store_true", help="one focal length for both directions")
    rec.add_argument(
        "--scale", metavar="A,B=1.25m", help="known distance between the cameras of two images (m, cm, ft, ...)"
    )
    rec.add_argument("--positions", help="known camera positions: lines of name x y z, GPS, or poses")


def _add_windows(rec: argparse._ActionsContainer) -> None:
    rec.add_argument("--window", metavar="auto|N", help="overlapping windows of N frames; auto: what fits, at most 60")
    rec.add_argument("--overlap", type=int, metavar="N", help="frames shared with the next window (default: half)")
    rec.add_argument(
        "--wide",
        action=argparse.BooleanOptionalAction,
        help="add windows over every 4th, 16th, ... frame against drift; a third more time (default)",
    )
    rec.add_argument("--loops", action=argparse.BooleanOptionalAction, help="close loops between windows (default)")


def _add_workers(rec: argparse._ActionsContainer) -> None:
    rec.add_argument(
        "--engine",
        default="local",
        choices=ENGINE,
        metavar="ENGINE",
        help=f"where windows or scenes are predicted:{listed(ENGINE)}",
    )
    rec.add_argument(
        "--ray-address",
        metavar="HOST:PORT|auto",
        help="running cluster; auto: the one on this machine (default: start one for this run)",
    )


def _add_output(rec: argparse._ActionsContainer) -> None:
    rec.add_argument(
        "--formats",
        help=f"comma-separated, or all (default: {USUAL_FORMATS}; with --window {WINDOW_FORMATS}){listed(FORMATS)}",
    )
    rec.add_argument(
        "--images", default="link", choices=IMAGES, metavar="HOW", help=f"how images/ is filled:{listed(IMAGES)}"
    )
    rec.add_argument(
        "--points", default="depth", choices=POINTS, metavar="SOURCE", help=f"where points come from:{listed(POINTS)}"
    )
    rec.add_argument(
        "--conf-percentile",
        type=float,
        default=30.0,
        metavar="PERCENT",
        help="leave out the least confident pixels, this percentage (default: %(default)s)",
    )
    rec.add_argument(
        "--edge-filter",
        type=float,
        metavar="JUMP",
        help="leave out flying pixels, where depth jumps by this fraction; try 0.25",
    )
    rec.add_argument(
        "--refine", metavar="ba", help="bundle adjustment on tracks measured in the images (needs pycolmap)"
    )
    rec.add_argument(
        "--tracks", default="auto", metavar="HOW", help=f"observations of the COLMAP model:{listed(TRACKS)}"
    )
    rec.add_argument(
        "--max-points",
        type=int,
        default=1_000_000,
        help="downsample the cloud to this many points (default: %(default)s)",
    )
    add_overwrite(rec)
    rec.add_argument(
        "--dry-run", action="store_true", help="print input size, memory and the files that would be written, and stop"
    )
