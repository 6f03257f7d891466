"""Whatever a setting is given as, it is taken or refused in one line; nothing of ours breaks on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from geoaccel.errors import UserError
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.tools.command import make_plan
from geoaccel.merging import MERGING
from geoaccel.quantization import QUANTIZATION

VALUES = (None, "abc", "", -1, 0, 1.5, True, [], [1, 2], ["a"], {"a": 1}, math.nan, math.inf)
COMMANDS = [
    ("eval", "data=synthetic"),
    ("eval", "data=folder"),
    ("eval", "data=co3d_vggt"),
    ("bench", "methods=[httm]"),
    ("bench", "suite=merge3d"),
    *(("eval", f"merging={name}") for name in sorted(MERGING)),
    *(("eval", f"quantization={name}") for name in sorted(QUANTIZATION)),
]


def settings_in(node: Mapping[str, Any], inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items():
        yield (*inside, key)
        if isinstance(value, dict):
            yield from settings_in(value, (*inside, key))


def broken(name: str, settings: dict[str, Any], path: tuple[str, ...], value: Any) -> str | None:
    """What a command says of a value that is no line for the user; None where it takes it or refuses it well."""
    changed = copy.deepcopy(settings)
    node = changed
    for key in path[:-1]:
        node = node[key]
    if isinstance(node[path[-1]], dict) and isinstance(value, dict):
        return None  # these are merged, and their names checked, before anything of ours sees them
    node[path[-1]] = value
    try:
        make_plan(name, changed)
    except (UserError, OSError):
        return None
    except Exception as error:
        return f"{'.'.join(path)}={value!r}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(("name", "override"), COMMANDS, ids=[override for _, override in COMMANDS])
def test_settings_of_any_kind(name: str, override: str) -> None:
    settings = compose_settings(name, [override, *(["data.root=here"] if "data=" in override else [])])
    group = override.partition("=")[0]
    own = group in ("merging", "quantization")
    paths = [path for path in settings_in(settings) if not own or path[0] == group]
    assert len(paths) > 3
    found = [broken(name, settings, path, value) for path in paths for value in VALUES]
    assert [line for line in found if line] == []
