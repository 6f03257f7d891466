"""All commands and their options, without torch: help, and what is wrong with a command line, are there at once."""

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

    measure.add_demo(add("demo", "reconstruct a rendered scene with the model in the package", measure.DEMO))
    reconstruct.add_reconstruct(add("reconstruct", "photographs to cameras, depth and points", reconstruct.EXAMPLES))
    view.add_view(add("view", "look at a result in the browser, or make one file of it to share", view.EXAMPLES))
    what = "score a model and its methods: key=value settings of configs/eval.yaml"
    measure.add_settings(add("eval", what, measure.EVAL), "eval")
    what = "time methods over frame counts: key=value settings of configs/bench.yaml"
    measure.add_settings(add("bench", what, measure.BENCH), "bench")
    measure.add_tune(add("tune", "from a budget to a plan: which layer bears what, on your photographs", measure.TUNE))
    quantizing = add("quantize", "make checkpoints small", quantize.EXAMPLES)
    actions = quantize.add_quantize(quantizing)

    info = add("info", "what is installed, which kernels work, what a checkpoint is", INFO)
    info.add_argument("model", nargs="?", help="embedded name, hub id or file to describe")
    info.add_argument("--backbones", action="store_true", help="a table of published checkpoints and what they cost")
    completion = add("completion", "a script that completes commands and options with the tab key", COMPLETION)
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")

    for command in {*commands.choices.values(), *actions} - {quantizing}:
        add_verbosity(command)
    return top


def subcommands(top: Parser) -> dict[str, Parser]:
    """The commands of a parser by name."""
    (found,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)
