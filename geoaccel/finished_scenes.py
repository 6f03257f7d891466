"""Finished scenes of ``--scenes``: the same command keeps them, so that it resumes an interrupted run.

``files.json`` of such a scene records what it was made from: the model with its methods and weights, the photographs,
and the options of the command. A scene is kept if all of that is the same and all of its files exist. Anything else in
its folder is refused, as in every output folder that is not empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from geoaccel.console import expand, print_json, say
from geoaccel.fingerprint import difference, of_json, of_sources
from geoaccel.images.sources import Picture
from geoaccel.manifest import MANIFEST
from geoaccel.windows.identity import identity_of, of_old, of_pictures

MADE_OF = "made_of"
"""Name of the entry in ``files.json``."""
OPTIONS = "options"
"""Name of the command's options in it."""
OF_NO_MATTER = (
    *("command", "run", "input", "out", "scenes", "overwrite", "dry_run", "quiet", "verbose"),
    *("engine", "ray_address", "max_memory"),
    *("model", "device", "dtype", "formats"),
)
"""Options that do not affect the result, or that `of_model` and `of_scene` handle themselves."""
FILES = ("plan", "masks", "poses", "depths", "intrinsics", "positions")
"""Options that may name a file or folder whose contents may change."""


def of_scene(args: argparse.Namespace, formats: Sequence[str], pictures: Sequence[Picture]) -> dict[str, Any]:
    """Everything besides the model that determines a scene's files, as plain data.

    Args:
        args: Command-line options.
        formats: Formats to write.
        pictures: Images of the scene.
    """
    options = {name: value for name, value in vars(args).items() if name not in OF_NO_MATTER}
    options |= {name: _with_file(options[name]) for name in FILES if options.get(name) is not None}
    options["formats"] = sorted(formats)
    return _plain({"images": of_pictures(pictures), OPTIONS: options})


def of_model(model: nn.Module) -> dict[str, Any]:
    """Everything about a loaded model and the writing code that determines a scene's files, as plain data."""
    return _plain({**identity_of(model), "code": of_sources(("",))})


def made_of(folder: Path) -> dict[str, Any] | None:
    """What a finished scene was made from; None if there is none, one of its files is missing, or it has no record."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        found = document[MADE_OF] if all((folder / name).exists() for name in document["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a folder whose scene was made from something else.

    Args:
        folder: Folder of the scene.
        before: The result of `made_of` for it.
        now: The same, or a part of it, for this run.

    Raises:
        FileExistsError: Naming the difference.
    """
    old = {name: before.get(name) for name in now}
    if isinstance(options := old.get(OPTIONS), dict):
        old[OPTIONS] = of_old(options, now[OPTIONS])
    if (other := difference(old, now)) is not None:
        raise FileExistsError(
            f"the output folder {folder} holds a finished scene made with different settings ({other}); give only the "
            "other scenes, choose another folder, or pass --overwrite to redo all of them"
        )


def say_kept(out: Path, *, dry_run: bool = False) -> None:
    """Report that a scene is kept, with a line of JSON on stdout as for new ones.

    Args:
        out: Folder of the scene.
        dry_run: No model was loaded, so its weights may still differ.
    """
    if dry_run:
        say(f"{out.name}: finished with the same options and images; kept if the model is the same, too")
    else:
        say(f"{out.name}: kept; it was finished with the same options, weights and images")
    print_json({**({"dry_run": True} if dry_run else {}), "out": str(out), "kept": True})


def _with_file(value: Any) -> Any:
    """A value that may be a path, with a fingerprint of the files there."""
    place = expand(value)
    if not place.exists():
        return value
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    known = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return [str(place.resolve()), of_json(known)]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
