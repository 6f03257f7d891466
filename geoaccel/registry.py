"""Registries: names to things, with errors that help, open to other packages."""

from __future__ import annotations

import difflib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar, overload

from geoaccel.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_READ: set[str] = set()
"""Groups of entry points that were read; several registries may share one."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping whose KeyError is a ValueError that says what there is and what was probably meant.

    Example:
        >>> @KERNELS.register("mine")
        ... def mine(q, k, v, bias): ...

    Args:
        what: What is registered, in the singular, as it appears in messages.
        entries: Initial names.
        package: Its modules are imported at the first look-up; each registers what it holds.
        group: Entry points ``geoaccel.GROUP``, with which other packages name modules of theirs that register more;
            they are imported then too. One that does not import, or registers nothing of its name, is a warning.
    """

    def __init__(
        self,
        what: str,
        entries: Mapping[str, T] | None = None,
        *,
        package: str | None = None,
        group: str | None = None,
    ) -> None:
        self.what = what
        self.package = package
        self.group = group
        self._entries: dict[str, T] = dict(entries or {})
        self._filled = False

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...
    @overload
    def register(self, name: str, thing: T) -> T: ...
    def register(self, name: str, thing: T | None = None) -> T | Callable[[T], T]:
        """Add a name; without a thing, a decorator that adds what it stands in front of.

        The same class or function again, by its module and name, takes the place of the former one: its module was
        reloaded.

        Raises:
            ValueError: If something else has the name.
        """
        if thing is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._entries and not _same(self._entries[name], thing):
            raise ValueError(f"{self.what} {name!r} is registered already; choose another name")
        self._entries[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        self._fill()
        if not isinstance(name, str) or name not in self._entries:  # settings may hold anything, a list too
            raise UserError(unknown(self.what, name, list(self._entries)))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(self._entries)

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def _fill(self) -> None:
        """Import everything that registers something here, once."""
        if self._filled:
            return
        self._filled = True  # first: what is imported may look something up
        if self.package is not None:
            for module in pkgutil.iter_modules(import_module(self.package).__path__, f"{self.package}."):
                import_module(module.name)
        if self.group is not None and self.group not in _READ:
            _READ.add(self.group)
            self._read_entry_points(self.group)

    def _read_entry_points(self, group: str) -> None:
        from importlib.metadata import entry_points

        for point in entry_points(group=f"geoaccel.{group}"):
            package = point.dist.name if point.dist is not None else point.value
            try:
                point.load()
            except Exception as error:  # anything may happen in another package, and nothing of ours depends on it
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("%s %r of the package %s is left out: %s", self.what, point.name, package, reason)
                continue
            if point.name not in self._entries:
                where = f"{point.value} of the package {package}"
                logger.warning("%s registers no %s %r, which is left out", where, self.what, point.name)


def _same(old: Any, new: Any) -> bool:
    """Whether two things are one class or function, of a module that was imported again."""
    names = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (old, new)]
    return old is new or (names[0] == names[1] and None not in names[0] and "<lambda>" not in str(names[0][1]))


def make(registry: Registry[Callable[..., T]], name: str, knobs: Mapping[str, Any]) -> T:
    """Make what is registered under a name with knobs that a user gave.

    Raises:
        ValueError: For a name or a knob that there is not.
    """
    check_knobs(registry, name, knobs)
    return registry[name](**knobs)


def check_knobs(registry: Registry[Callable[..., Any]], name: str, knobs: Iterable[str]) -> None:
    """Refuse a name or a knob that there is not.

    Raises:
        ValueError: Naming it, and those that there are.
    """
    known = list(inspect.signature(registry[name]).parameters)
    for knob in knobs:
        if knob not in known:
            raise UserError(unknown(f"knob of {name}", knob, known))


def unknown(what: str, name: str, known: list[str]) -> str:
    """One line: what was given, what is allowed, what was probably meant."""
    listing = ", ".join(sorted(known)) if known else "none in this version"
    return f"unknown {what} {name!r}; known: {listing}{meant(name, known)}"


def meant(name: str, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a sentence; empty where nothing is like it."""
    guess = difflib.get_close_matches(str(name), list(known), n=1)
    return f". Did you mean {guess[0]!r}?" if guess else ""
