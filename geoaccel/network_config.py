"""Sizes of a network as a frozen dataclass: checked on construction, plain data in a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Self, get_type_hints

from geoaccel.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Configuration of a network.

    A subclass has fields of type ``int``, ``float``, ``tuple[int, ...]`` and ``tuple[str, ...]``, whose defaults are
    the published sizes. Numbers are positive; tuples may be given as lists. :meth:`check` checks that sizes are
    consistent.

    Attributes:
        may_be_zero: Whole numbers that may be 0.
    """

    may_be_zero: ClassVar[Collection[str]] = ()

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in self.names():
            value = getattr(self, name)
            kind = (_count, "a whole number, 0 or more") if name in self.may_be_zero else KINDS[kinds[name]]
            try:
                object.__setattr__(self, name, kind[0](value))
            except (TypeError, ValueError):
                raise UserError(f"{name}={value!r} is not {kind[1]}") from None
        self.check()

    def check(self) -> None:
        """Refuse inconsistent sizes.

        Raises:
            ValueError: Naming them.
        """

    @classmethod
    def names(cls) -> list[str]:
        """The keywords, in order."""
        return [entry.name for entry in dataclasses.fields(cls)]

    @classmethod
    def read(cls, keywords: Mapping[str, Any], what: str) -> Self:
        """The configuration from keywords.

        Args:
            keywords: By name; missing ones take their defaults.
            what: Name of their source, for messages.

        Raises:
            ValueError: For an unknown keyword or a value that does not fit.
        """
        known = cls.names()
        for name in keywords:
            if name not in known:
                guess = difflib.get_close_matches(name, known, n=1)
                hint = f". Did you mean {guess[0]!r}?" if guess else ""
                raise UserError(f"{what} takes no keyword {name!r}; known keywords: {', '.join(known)}{hint}")
        try:
            return cls(**keywords)
        except UserError as error:
            raise UserError(f"{what} cannot be built: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``, from which :meth:`read` restores the same configuration."""
        return dataclasses.asdict(self)


def _count(value: Any) -> int:
    if isinstance(value, bool) or operator.index(value) < 0:
        raise ValueError
    return operator.index(value)


def _positive(value: Any) -> int:
    if _count(value) == 0:
        raise ValueError
    return _count(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError
    return value  # type: ignore[return-value]  # whole numbers stay integers, in files too


def _counts(value: Any) -> tuple[int, ...]:
    if not len(value):
        raise ValueError
    return tuple(_count(entry) for entry in value)


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(entry, str) for entry in value):
        raise ValueError
    return tuple(value)


KINDS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_positive, "a whole number, 1 or more"),
    float: (_number, "a positive number"),
    tuple[int, ...]: (_counts, "a list of whole numbers"),
    tuple[str, ...]: (_words, "a list of names"),
}
"""By field type: the function that reads a value, and the wording of what is allowed."""
