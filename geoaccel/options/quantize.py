"""Options of ``geoaccel quantize``."""

from __future__ import annotations

import argparse
from typing import Any

from geoaccel.options.common import MODEL, add_device, add_overwrite
from geoaccel.options.names import DTYPES, PROTECT, QUANTIZATION, ROUNDING, SEARCH, listed, one_of
from geoaccel.options.parser import Parser

EXAMPLES = (
    "geoaccel quantize export --model facebook/VGGT-1B --quantization w4a16 --out vggt-w4.safetensors",
    "geoaccel quantize calibrate --model vggt-mini --quantization w4a16 --images photos/ --out mini-w4.safetensors",
)
EXPORT = {
    "export": "write a quantized checkpoint, without calibration",
    "calibrate": "write a quantized checkpoint, calibrated on images",
}
SENSITIVITY = "measure which blocks tolerate quantization, and choose mixed precision"
MORE = {
    "export": (
        EXAMPLES[0],
        "geoaccel quantize export --model vggt-mini --allocation mix.json --out mini-mix.safetensors",
    ),
    "calibrate": (
        EXAMPLES[1],
        "geoaccel quantize calibrate --model vggt-mini --quantization w4a16 --search none --out mini-w4.safetensors",
    ),
    "sensitivity": (
        "geoaccel quantize sensitivity --model vggt-mini --quantization w4a16 --out mix.json",
        "geoaccel quantize sensitivity --model vggt-mini --quantization w4a16 --images photos/ --out mix.json",
    ),
}


def add_quantize(quantize: argparse.ArgumentParser) -> list[Parser]:
    """The actions of the command: export, calibrate, sensitivity."""
    actions: Any = quantize.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    found = []
    for name, what in {**EXPORT, "sensitivity": SENSITIVITY}.items():
        action = actions.add_parser(name, help=what, description=what.capitalize() + ".", examples=MORE[name])
        _add_method(action, name)
        found.append(action)
    _add_scenes(found[1], scenes=8)
    _add_calibration(found[1].add_argument_group("calibration"))
    _add_scenes(found[2], scenes=16)
    _add_mix(found[2].add_argument_group("mixed precision"))
    return found


def _add_method(action: argparse.ArgumentParser, name: str) -> None:
    exports = name in EXPORT
    action.add_argument("--model", required=True, help=MODEL)
    what = "file to write, *.safetensors" if exports else "file to write, *.json; the plot goes beside it"
    action.add_argument("--out", required=True, help=what)
    method = action.add_argument_group("method")
    method.add_argument(
        "--quantization",
        metavar="METHOD",
        type=one_of("quantization method", QUANTIZATION, "quantization"),
        help=f"format of the weights:{listed(QUANTIZATION)}",
    )
    if exports:
        method.add_argument(
            "--allocation", metavar="FILE", help="mixed precision from quantize sensitivity, instead of --quantization"
        )
    method.add_argument("--include", action="append", metavar="NAMES", help="layers to quantize, e.g. 'aggregator.*'")
    method.add_argument("--exclude", action="append", metavar="NAMES", help="layers not to quantize")
    method.add_argument("--group-size", type=int, help="number of weights that share a scale (w4a16: 128)")
    if exports:
        known = {kind: what for kind, what in DTYPES.items() if kind != "auto"}
        method.add_argument(
            "--dtype",
            default="float16",
            choices=known,
            metavar="TYPE",
            help=f"precision of everything else (default: %(default)s){listed(known)}",
        )
    add_overwrite(action, "file")


def _add_scenes(action: argparse.ArgumentParser, scenes: int) -> None:
    images = action.add_argument_group("images")
    images.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders of images, one scene each (default: rendered scenes)",
    )
    images.add_argument("--co3d", metavar="ROOT", help="sample training sequences of CO3Dv2")
    images.add_argument("--co3d-subset", default="fewview_train", help="CO3D set list (default: %(default)s)")
    images.add_argument("--categories", nargs="+", default=[], help="CO3D categories (default: all)")
    images.add_argument(
        "--scenes", type=int, default=scenes, help="number of scenes to render or sample (default: %(default)s)"
    )
    images.add_argument("--frames", type=int, default=8, help="images at a time (default: %(default)s)")
    images.add_argument(
        "--first-seed",
        type=int,
        help="first seed of rendered scenes, or of sampling (default: the first one of the training set)",
    )
    images.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images of your evaluation: using any of them here is refused",
    )
    add_device(images)


def _add_calibration(action: argparse._ActionsContainer) -> None:
    action.add_argument(
        "--all-tokens", action="store_true", help="include camera and register tokens in the statistics"
    )
    action.add_argument(
        "--search", default="awq", choices=SEARCH, metavar="HOW", help=f"how scales are found:{listed(SEARCH)}"
    )
    action.add_argument("--shortlist", type=int, default=4, help="scales tried for each layer (default: %(default)s)")
    action.add_argument(
        "--rounding",
        default="compensated",
        choices=ROUNDING,
        metavar="HOW",
        help=f"how weights are rounded:{listed(ROUNDING)}",
    )
    action.add_argument("--camera-token", action="store_true", help="try VGGT's compensation token; kept if it helps")


def _add_mix(action: argparse._ActionsContainer) -> None:
    action.add_argument(
        "--protect",
        default="fp8",
        choices=PROTECT,
        metavar="HOW",
        help=f"precision of protected blocks:{listed(PROTECT)}",
    )
    action.add_argument(
        "--budget-gb",
        type=float,
        help="file size in GB (default: a quarter of the way from no to all blocks protected)",
    )
    action.add_argument(
        "--max-effect", type=float, help="instead of a size: limit for the summed effect of unprotected blocks"
    )
    action.add_argument("--rank-by", default="pose_deg", help="effect to rank blocks by (default: %(default)s)")
    action.add_argument("--draws", type=int, default=3, help="random selections to compare with (default: %(default)s)")
