"""Settings of a script as ``key=value`` on its command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from geoaccel.errors import UserError, run_program


def run_with_settings(name: str, defaults: Mapping[str, str], work: Callable[[dict[str, str]], object]) -> int:
    """Run a script with its settings and return its exit code; see :func:`geoaccel.errors.run_program`.

    Args:
        name: Name of the script.
        defaults: All settings with their defaults.
        work: Called with all settings.
    """

    def run() -> None:
        given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
        unknown = given.keys() - defaults.keys()
        if unknown:
            raise UserError(f"unknown setting {sorted(unknown)[0]!r}; known: {', '.join(defaults)}")
        work({**defaults, **given})

    return run_program(name, run)
