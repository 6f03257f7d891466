"""Type checks of the knobs in a frozen dataclass, on construction."""

from __future__ import annotations

import dataclasses
import operator
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from geoaccel.errors import UserError


def check_knobs(knobs: Any, name: str) -> None:
    """Refuse knobs of a wrong type, and make all of them hashable: lists, as in settings files, become tuples.

    By annotation, checks booleans (the word ``no`` would count as true), integers and literals; the method itself
    checks ranges and sequences of numbers.

    Args:
        knobs: The frozen dataclass under construction.
        name: Name of what they belong to, for the message.

    Raises:
        ValueError: Naming the knob and its value.
    """
    try:
        hints = get_type_hints(type(knobs))
    except NameError:  # imported for type checkers only
        hints = {}
    for knob in dataclasses.fields(knobs):
        given = getattr(knobs, knob.name)
        value = _checked(given, hints.get(knob.name, Any), f"{name}: {knob.name}={given!r}")
        if value is not given:
            object.__setattr__(knobs, knob.name, value)


def _checked(given: Any, hint: Any, what: str) -> Any:
    """A knob as stored."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and given is None:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if kinds == (bool,) and not isinstance(given, bool):
        raise UserError(f"{what} must be true or false")
    if kinds == (int,):
        if isinstance(given, bool) or (number := whole_numbers([given])) is None:
            raise UserError(f"{what} must be a whole number")
        return number[0]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal and _frozen(given) not in get_args(kinds[0]):
        raise UserError(f"{what}; known: {', '.join(map(str, get_args(kinds[0])))}")
    try:
        hash(frozen := _frozen(given))
    except TypeError:
        raise UserError(f"{what} contains a {type(given).__name__}; give plain values (numbers, text, lists)") from None
    return frozen


def _frozen(given: Any) -> Any:
    """Nested lists and arrays as tuples."""
    if isinstance(given, list | tuple):
        return tuple(map(_frozen, given))
    return _frozen(given.tolist()) if getattr(given, "ndim", 0) else given


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """The entries of a knob as integers, NumPy's included; None if it is not a sequence of integers."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        return None
