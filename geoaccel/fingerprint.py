"""Short hashes (fingerprints) of bytes, files, and the installed sources.

Results cached on disk carry the fingerprints of what produced them, so that none is mistaken for the result of other
weights or other code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LENGTH = 16
PACKAGE = __name__.partition(".")[0]
# Parts of the package, without "geoaccel.", that do not affect a network's output. All others count, new ones too.
NOT_OF_NETWORKS = (
    *("cli", "info", "eval", "configs", "mllm", "testing", "runtime", "bfloat16", "version", "memory"),
    *("reconstruction", "scene", "export", "point_cloud", "quantized_file", "atomic", "fingerprint"),
    *("sharding", "outliers", "windows", "windows_command", "workers", "__main__"),
)


def of_bytes(*parts: bytes) -> str:
    """Sixteen hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:LENGTH]


def of_json(value: Any) -> str:
    """Fingerprint of plain data, independent of the order of its keys."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def of_file(path: str | os.PathLike[str]) -> str:
    """Fingerprint of a file's contents; read again when its size or modification time changes.

    Safetensors files with the same tensors and metadata have the same one, whatever the order in their headers.
    """
    path = Path(path)
    changed = path.stat()
    return _of_file(path, changed.st_size, changed.st_mtime_ns)


@lru_cache(maxsize=4096)
def _of_file(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header = file.read(min(size, int.from_bytes(file.read(8), "little")))
            # Metadata is written in random order. A damaged header is refused by whoever reads the file.
            with suppress(ValueError):
                header = json.dumps(json.loads(header), sort_keys=True).encode()
            digest.update(header)
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:LENGTH]


def of_files(name: str, method: Any) -> dict[str, str]:
    """Of the files that a method reads, named after it: those of its knobs, and those that it finds by itself."""
    paths = {knob: Path(value) for knob, value in vars(method).items() if isinstance(value, str | os.PathLike)}
    found = {knob: path.expanduser() for knob, path in paths.items() if path.expanduser().is_file()}
    found |= {path.name: path for path in getattr(method, "files", list)()}
    return {f"{name}.{key}": of_file(path) for key, path in found.items()}


def of_networks() -> str:
    """Fingerprint of the sources that affect a network's output: networks, methods, kernels, image preprocessing."""
    return of_sources(("",), NOT_OF_NETWORKS)


@lru_cache(maxsize=64)
def of_sources(chosen: Iterable[str], without: Iterable[str] = ()) -> str:
    """Fingerprint of the installed Python files of this package; read once per process.

    Args:
        chosen: Tuple of modules, without "geoaccel."; a package includes everything in it, "" is everything.
        without: Tuple of modules or packages to exclude.
    """
    found = sources(chosen, without)
    return of_bytes(*(part for name, path in found.items() for part in (f"\n{name}\n".encode(), path.read_bytes())))


def sources(chosen: Iterable[str], without: Iterable[str] = ()) -> dict[str, Path]:
    """Modules of this package, without "geoaccel.", sorted by name, as :func:`of_sources` takes them."""

    def within(name: str, parts: Iterable[str]) -> bool:
        return any(not part or f"{name}.".startswith(f"{part}.") for part in parts)

    every = _every_source()
    return {name: every[name] for name in sorted(every) if within(name, chosen) and not within(name, without)}


def _every_source() -> dict[str, Path]:
    found = {}
    # In a checkout these folders are next to each other, installed they are nested.
    for package in ("", "models", "eval"):
        spec = find_spec(f"{PACKAGE}.{package}".removesuffix("."))
        for root in map(Path, (spec.submodule_search_locations or ()) if spec is not None else ()):
            for path in root.rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(filter(None, (package, *(part for part in parts if part != "__init__"))))] = path
    return found


def of_others(things: Iterable[Any]) -> dict[str, str]:
    """Fingerprints of the sources of classes and functions from other packages, by package name.

    Modules that these import are included, unless they belong to another distribution.
    """
    names = {thing.__module__.partition(".")[0] for thing in things} - {PACKAGE}
    return {name: _of_package(name) for name in sorted(names)}


@lru_cache(maxsize=64)
def _of_package(name: str) -> str:
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    own, found, waiting = set(owners.get(name, ())), dict[str, list[bytes]](), [name]
    elsewhere = {PACKAGE, *sys.stdlib_module_names, *(one for one in owners if not own & set(owners[one]))} - {name}
    while waiting:
        one = waiting.pop()
        if one not in found and one not in elsewhere:
            found[one] = [path.read_bytes() for path in _files_of(one)]
            waiting += [other for source in found[one] for other in _imports(source)]
    return of_bytes(*found.pop(name), *(source for one in sorted(found) for source in found[one]))


def _files_of(name: str) -> list[Path]:
    """Source files of a module or package; none for code typed into a notebook."""
    module, spec = sys.modules.get(name), None if name in sys.modules else find_spec(name)
    roots = getattr(module, "__path__", None) or getattr(spec, "submodule_search_locations", None) or ()
    file = Path(getattr(module, "__file__", None) or getattr(spec, "origin", None) or "")
    return [path for root in map(Path, roots) for path in sorted(root.rglob("*.py"))] or [file] * file.is_file()


def _imports(source: bytes) -> Iterator[str]:
    """Top-level names of the modules that a source imports, at any place in it."""
    with suppress(SyntaxError, ValueError):  # compiled, or of another version of Python
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def difference(before: Any, now: Mapping[str, Any]) -> str | None:
    """The first setting, by name, that differs: ``data.frames was 3, is now 2``; None if all are equal."""
    old = before if isinstance(before, Mapping) else {}
    for key in sorted({*old, *now}):
        was, is_now = old.get(key), now.get(key)
        if was != is_now:
            if isinstance(was, Mapping) and isinstance(is_now, Mapping):
                return f"{key}.{difference(was, is_now)}"
            if isinstance(was, list) and isinstance(is_now, list) and _short(was) == _short(is_now):
                return f"{key} {_of_lists(was, is_now)}"
            return f"{key} was {_short(was)}, is now {_short(is_now)}"
    return None


def _of_lists(was: list[Any], is_now: list[Any]) -> str:
    """How two lists differ: in length, else in the first different entry."""
    if len(was) != len(is_now):
        return f"had {len(was)} entries, has {len(is_now)} now"
    place = next(i for i, (old, new) in enumerate(zip(was, is_now, strict=True)) if old != new)
    return f"entry {place} was {_short(was[place])}, is now {_short(is_now[place])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
