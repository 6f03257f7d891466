"""The parser of every command: one line for what is wrong, with what was probably meant; help in groups."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from geoaccel.registry import meant

WIDEST = 100


class Help(argparse.HelpFormatter):
    """Lines that a help text breaks itself stay lines: a choice and what it does on each; so do examples."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, max_help_position=28, width=width - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [piece for line in text.splitlines() for piece in _wrapped(line, width)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()  # an example is copied whole
        pieces = (piece for line in lines for piece in ([line] if line.startswith(" ") else _wrapped(line, width)))
        return "\n".join(f"{indent}{piece}" for piece in pieces)


class Parser(argparse.ArgumentParser):
    """What is wrong is one line, not the whole usage; an option is told from its misspelling first.

    Args:
        examples: Command lines, shown under the help.
        given: As `argparse.ArgumentParser` takes them.
    """

    def __init__(self, *, examples: Sequence[str] = (), **given: Any) -> None:
        given.setdefault("formatter_class", Help)
        if examples:
            given["epilog"] = "\n".join(["examples:", *(f"  {line}" for line in examples)])
        super().__init__(**given)
        self._mixes = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"geoaccel: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        self._check_spelling(given)
        found, left = super().parse_known_args(given, namespace)
        if not left or self._mixes or self._subparsers is not None:
            return found, left
        # argparse takes all positional arguments at the first: what stands behind an option is left.
        self._mixes = True
        try:
            return self.parse_known_intermixed_args(given)
        finally:
            self._mixes = False

    def _check_spelling(self, args: list[str]) -> None:
        """Before a required option is missed that is there under another spelling."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for given in args:
            if given == "--" or (self._subparsers is not None and not given.startswith("-")):
                return  # the rest is positional, or of a command
            name = given.partition("=")[0]
            if not re.match(r"-[^\d.]", name) or any(option.startswith(name) for option in known):
                continue
            if name.startswith("--") or not any(letter in self._option_string_actions for letter in (name, name[:2])):
                self.error(f"unrecognized arguments: {name}{meant(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}; known: {', '.join(known)}{meant(value, known)}"
            )


def _wrapped(line: str, width: int) -> list[str]:
    deeper = " " * (len(line) - len(line.lstrip()) + 2) if line.startswith(" ") else ""
    return textwrap.wrap(line, width, subsequent_indent=deeper, break_long_words=False, break_on_hyphens=False)
