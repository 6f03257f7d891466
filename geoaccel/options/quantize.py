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
    "export": "write a quantized checkpoint, without data",
    "calibrate": "write a quantized checkpoint, with scales that were searched on images",
}
SENSITIVITY = "measure which blocks bear quantization, and choose a mix"
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
    _add_mix(found[2].add_argument_group("mix"))
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
        help=f"of the weights:{listed(QUANTIZATION)}",
    )
    if exports:
        method.add_argument(
            "--allocation", metavar="FILE", help="mixed precision from quantize sensitivity, for --quantization"
        )
    method.add_argument("--include", action="append", metavar="NAMES", help="layers to quantize, as 'aggregator.*'")
    method.add_argument("--exclude", action="append", metavar="NAMES", help="layers to leave as they are")
    method.add_argument("--group-size", type=int, help="weights that share a scale (w4a16: 128)")
    if exports:
        known = {kind: what for kind, what in DTYPES.items() if kind != "auto"}
        method.add_argument(
            "--dtype",
            default="float16",
            choices=known,
            metavar="TYPE",
            help=f"of everything else (default: %(default)s){listed(known)}",
        )
    add_overwrite(action, "file")


def _add_scenes(action: argparse.ArgumentParser, scenes: int) -> None:
    images = action.add_argument_group("images")
    images.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="one scene each (default: rendered)")
    images.add_argument("--co3d", metavar="ROOT", help="sample training sequences of CO3Dv2")
    images.add_argument("--co3d-subset", default="fewview_train", help="set list of CO3D (default: %(default)s)")
    images.add_argument("--categories", nargs="+", default=[], help="of CO3D (default: all)")
    images.add_argument("--scenes", type=int, default=scenes, help="to render or to sample (default: %(default)s)")
    images.add_argument("--frames", type=int, default=8, help="images at a time (default: %(default)s)")
    images.add_argument(
        "--first-seed", type=int, help="of rendered scenes, or of sampling (default: the first one kept for training)"
    )
    images.add_argument(
        "--evaluation", nargs="+", default=[], metavar="PATH", help="images that must not be used: they judge"
    )
    add_device(images)


def _add_calibration(action: argparse._ActionsContainer) -> None:
    action.add_argument("--all-tokens", action="store_true", help="count camera and register tokens too")
    action.add_argument(
        "--search", default="awq", choices=SEARCH, metavar="HOW", help=f"how scales are found:{listed(SEARCH)}"
    )
    action.add_argument("--shortlist", type=int, default=4, help="scales tried for each layer (default: %(default)s)")
    action.add_argument(
        "--rounding",
        default="compensated",
        choices=ROUNDING,
        metavar="HOW",
        help=f"how weights get their codes:{listed(ROUNDING)}",
    )
    action.add_argument("--camera-token", action="store_true", help="try VGGT's compensation token; kept if it helps")


def _add_mix(action: argparse._ActionsContainer) -> None:
    action.add_argument(
        "--protect", default="fp8", choices=PROTECT, metavar="HOW", help=f"of protected blocks:{listed(PROTECT)}"
    )
    action.add_argument("--budget-gb", type=float, help="size of the file; default: a quarter of all protection")
    action.add_argument("--max-effect", type=float, help="instead: what unprotected blocks may add up to")
    action.add_argument("--rank-by", default="pose_deg", help="effect that decides (default: %(default)s)")
    action.add_argument("--draws", type=int, default=3, help="random controls (default: %(default)s)")
