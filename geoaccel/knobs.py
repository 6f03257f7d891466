"""What knobs are given as: checked where a frozen dataclass of them is made."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from geoaccel.errors import UserError


def check_flags(knobs: Any, name: str) -> None:
    """Refuse a knob that is true or false and was given as something else: the word ``no`` would count as true.

    Args:
        knobs: A dataclass; those whose default is true or false are looked at.
        name: Of what they belong to, for the message.

    Raises:
        ValueError: Naming the knob and its value.
    """
    for knob in dataclasses.fields(knobs):
        value = getattr(knobs, knob.name)
        if isinstance(knob.default, bool) and not isinstance(value, bool):
            raise UserError(f"{name}: {knob.name}={value!r} is neither true nor false; give one of them")


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """The entries of a knob as integers, NumPy's too; None where it is no row of them."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        return None
