"""Registries: map names to objects, with helpful errors, extensible by other packages."""

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
    """A mapping that raises a ValueError for unknown names, with the known names and a suggestion.

    Example:
        >>> @KERNELS.register("mine")
        ... def mine(q, k, v, bias): ...

    Args:
        what: Kind of the entries, in the singular, for messages.
        entries: Initial names.
        package: Its modules are imported at the first look-up; each registers its entries.
        group: Entry points ``geoaccel.GROUP`` of other packages, whose modules register more; they are imported then,
            too. One that cannot be imported, or does not register its name, causes a warning.
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
        """Register an object; without one, return a decorator.

        The same class or function (by module and name) replaces the former one: its module was reloaded.

        Raises:
            ValueError: If the name is taken.
        """
        if thing is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._entries and not _same(self._entries[name], thing):
            raise ValueError(f"{self.what} {name!r} is already registered; choose another name")
        self._entries[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        self._fill()
        if not isinstance(name, str) or name not in self._entries:  # settings may contain anything, also lists
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
        """Import everything that registers entries here, once."""
        if self._filled:
            return
        self._filled = True  # first: imported modules may look something up
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
            except Exception as error:  # other packages may raise anything, and nothing here depends on them
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("%s %r of the package %s is ignored: %s", self.what, point.name, package, reason)
                continue
            if point.name not in self._entries:
                where = f"{point.value} of the package {package}"
                logger.warning("%s does not register the %s %r, which is ignored", where, self.what, point.name)


def _same(old: Any, new: Any) -> bool:
    """Whether two objects are the same class or function, from a module imported again."""
    names = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (old, new)]
    return old is new or (names[0] == names[1] and None not in names[0] and "<lambda>" not in str(names[0][1]))


def make(registry: Registry[Callable[..., T]], name: str, knobs: Mapping[str, Any]) -> T:
    """Construct a registered object with knobs from the user.

    Raises:
        ValueError: For an unknown name or knob.
    """
    check_knobs(registry, name, knobs)
    return registry[name](**knobs)


def check_knobs(registry: Registry[Callable[..., Any]], name: str, knobs: Iterable[str]) -> None:
    """Refuse an unknown name or knob.

    Raises:
        ValueError: Naming it, and the known ones.
    """
    known = list(inspect.signature(registry[name]).parameters)
    for knob in knobs:
        if knob not in known:
            raise UserError(unknown(f"knob of {name}", knob, known))


def unknown(what: str, name: str, known: list[str]) -> str:
    """One line: what was given, what is allowed, and a suggestion."""
    listing = ", ".join(sorted(known)) if known else "none in this version"
    return f"unknown {what} {name!r}; known: {listing}{meant(name, known)}"


def meant(name: str, known: Iterable[str]) -> str:
    """A suggestion, as the end of a sentence; empty if nothing is similar."""
    guess = difflib.get_close_matches(str(name), list(known), n=1)
    return f". Did you mean {guess[0]!r}?" if guess else ""
