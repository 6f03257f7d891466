"""Short hashes (fingerprints) of bytes, files, and the installed sources.

Results cached on disk carry the fingerprints of what produced them, so that none is mistaken for the result of other
weights or other code.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
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
    """Fingerprints of the sources of classes and functions from other packages, by package name."""
    names = {thing.__module__.partition(".")[0] for thing in things} - {PACKAGE}
    return {name: _of_package(name) for name in sorted(names)}


@lru_cache(maxsize=64)
def _of_package(name: str) -> str:
    module = sys.modules[name]
    file = getattr(module, "__file__", None)  # None in a notebook
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    files = [path for root in roots for path in sorted(root.rglob("*.py"))] or ([Path(file)] if file else [])
    return of_bytes(*(path.read_bytes() for path in files))


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
