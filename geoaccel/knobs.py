"""Checks the types of knobs where a frozen dataclass of them is made."""

from __future__ import annotations

import dataclasses
import operator
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from geoaccel.errors import UserError


def check_knobs(knobs: Any, name: str) -> None:
    """Refuse knobs of a wrong kind, and make all of them hashable: lists become tuples, as settings files have lists.

    Looked at are switches (the word ``no`` would count as true), whole numbers, and words that are one of several, by
    the annotation of each; ranges and rows of numbers are for the method to check.

    Args:
        knobs: A frozen dataclass that is being made.
        name: Of what they belong to, for the message.

    Raises:
        ValueError: Naming the knob and its value.
    """
    try:
        hints = get_type_hints(type(knobs))
    except NameError:  # imported for type checkers alone
        hints = {}
    for knob in dataclasses.fields(knobs):
        given = getattr(knobs, knob.name)
        value = _checked(given, hints.get(knob.name, Any), f"{name}: {knob.name}={given!r}")
        if value is not given:
            object.__setattr__(knobs, knob.name, value)


def _checked(given: Any, hint: Any, what: str) -> Any:
    """A knob as it is kept."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and given is None:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if kinds == (bool,) and not isinstance(given, bool):
        raise UserError(f"{what} is neither true nor false; give one of them")
    if kinds == (int,):
        if isinstance(given, bool) or (number := whole_numbers([given])) is None:
            raise UserError(f"{what} is no whole number; give one")
        return number[0]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal and _frozen(given) not in get_args(kinds[0]):
        raise UserError(f"{what}; known: {', '.join(map(str, get_args(kinds[0])))}")
    try:
        hash(frozen := _frozen(given))
    except TypeError:
        raise UserError(f"{what} holds a {type(given).__name__}, which no knob takes; give plain values") from None
    return frozen


def _frozen(given: Any) -> Any:
    """Lists and arrays, however deep, as tuples."""
    if isinstance(given, list | tuple):
        return tuple(map(_frozen, given))
    return _frozen(given.tolist()) if getattr(given, "ndim", 0) else given


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """The entries of a knob as integers, NumPy's too; None where it is no row of them."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        return None
