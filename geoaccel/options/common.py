"""Options that several commands have."""

from __future__ import annotations

import argparse

from geoaccel.options.names import DTYPES, listed

MODEL = "bundled name (vggt-mini, pi3-mini), hub id (facebook/VGGT-1B) or file"


def add_verbosity(command: argparse.ArgumentParser) -> None:
    """How much is said; every command has these."""
    group = command.add_argument_group("output on the terminal")
    group.add_argument("-q", "--quiet", action="store_true", help="results, warnings and errors only; no progress bars")
    group.add_argument("-v", "--verbose", action="store_true", help="print more detail")


def add_device(command: argparse._ActionsContainer) -> None:
    """Where a model runs."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def add_dtype(command: argparse._ActionsContainer) -> None:
    """In which precision a model runs."""
    command.add_argument("--dtype", default="auto", choices=DTYPES, metavar="TYPE", help=f"precision:{listed(DTYPES)}")


def add_overwrite(command: argparse._ActionsContainer, what: str = "result") -> None:
    """Whether what is there is replaced."""
    command.add_argument("--overwrite", action="store_true", help=f"replace an earlier {what}")
