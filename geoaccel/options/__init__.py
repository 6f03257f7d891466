"""All commands and their options, without torch, so that help and errors of a command line are immediate."""

from __future__ import annotations

import argparse
from typing import Any

from geoaccel.options import measure, quantize, reconstruct, view
from geoaccel.options.common import add_verbosity
from geoaccel.options.parser import Parser
from geoaccel.version import __version__

EXAMPLES = (
    "geoaccel demo",
    "geoaccel reconstruct photos/ --model facebook/VGGT-1B --merging asymmetric --out scene/",
)
INFO = ("geoaccel info", "geoaccel info facebook/VGGT-1B")
COMPLETION = (
    "geoaccel completion bash > ~/.local/share/bash-completion/completions/geoaccel",
    "geoaccel completion zsh > ~/.zfunc/_geoaccel",
)
SHELLS = ("bash", "zsh", "fish", "tcsh")


def make_parser() -> Parser:
    """The parser of ``geoaccel``; ``command`` of what it returns says what is to be run."""
    top = Parser(
        prog="geoaccel",
        description="Fast, small, measured feed-forward 3D reconstruction.",
        examples=(*EXAMPLES, "geoaccel COMMAND --help"),
    )
    top.add_argument("--version", action="version", version=f"geoaccel {__version__}")
    commands: Any = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, what: str, examples: tuple[str, ...]) -> Parser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", examples=examples)

    measure.add_demo(add("demo", "reconstruct a rendered scene with the bundled model", measure.DEMO))
    reconstruct.add_reconstruct(
        add("reconstruct", "reconstruct cameras, depth and points from photographs", reconstruct.EXAMPLES)
    )
    view.add_view(add("view", "view a result in the browser, or export it as one HTML file", view.EXAMPLES))
    what = "score a model and its methods, with key=value settings of configs/eval.yaml"
    measure.add_settings(add("eval", what, measure.EVAL), "eval")
    what = "time methods over frame counts, with key=value settings of configs/bench.yaml"
    measure.add_settings(add("bench", what, measure.BENCH), "bench")
    measure.add_tune(
        add("tune", "find the fastest per-layer plan within an error budget, on your photographs", measure.TUNE)
    )
    quantizing = add("quantize", "make checkpoints smaller", quantize.EXAMPLES)
    actions = quantize.add_quantize(quantizing)

    info = add("info", "print what is installed, which kernels work, and facts about a checkpoint", INFO)
    info.add_argument("model", nargs="?", help="bundled name, hub id or file to describe")
    info.add_argument("--backbones", action="store_true", help="table of published checkpoints and their cost")
    completion = add("completion", "print a script for tab completion", COMPLETION)
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")

    for command in {*commands.choices.values(), *actions} - {quantizing}:
        add_verbosity(command)
    return top


def subcommands(top: Parser) -> dict[str, Parser]:
    """The commands of a parser by name."""
    (found,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)
