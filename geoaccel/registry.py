"""Names to things, with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from geoaccel.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping whose KeyError is a ValueError that says what there is and what was probably meant.

    Args:
        what: What is registered, in the singular, as it appears in messages.
        entries: Initial names.
    """

    def __init__(self, what: str, entries: Mapping[str, T] | None = None) -> None:
        self.what = what
        self._entries: dict[str, T] = dict(entries or {})

    def register(self, name: str, thing: T) -> T:
        """Add a name.

        Raises:
            ValueError: If it is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.what} {name!r} is registered already")
        self._entries[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(unknown(self.what, name, list(self._entries)))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unknown(what: str, name: str, known: list[str]) -> str:
    """One line: what was given, what is allowed, what was probably meant."""
    listing = ", ".join(sorted(known)) if known else "none in this version"
    guess = difflib.get_close_matches(str(name), known, n=1)
    hint = f". Did you mean {guess[0]!r}?" if guess else ""
    return f"unknown {what} {name!r}; known: {listing}{hint}"
