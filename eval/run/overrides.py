"""Misspelt settings, found in the presets' own files before hydra, torch and the methods are imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from geoaccel.errors import UserError
from geoaccel.registry import meant, unknown

CONFIGS = "geoaccel.configs"


def check_config(name: str) -> None:
    """Refuse a configuration that there is not.

    Raises:
        UserError: Naming those that there are.
    """
    known = sorted(path.name.removesuffix(".yaml") for path in files(CONFIGS).iterdir() if path.name.endswith(".yaml"))
    if name not in known:
        measures = [one for one in known if {"timing", "suite"} & set(settings_of(one))]  # the others train
        raise UserError(unknown("configuration (--config)", name, measures))


def check_overrides(name: str, overrides: Sequence[str]) -> None:
    """Refuse ``key=value`` whose key begins with no setting of a configuration; what is inside of one is for hydra.

    Args:
        name: File in ``configs``, without its suffix.
        overrides: As given on the command line.

    Raises:
        UserError: For a configuration or a key that there is not, or for what is no ``key=value``.
    """
    check_config(name)
    known = settings_of(name)
    for given in overrides:
        key = re.match(r"(?:\+\+?|~)?([^=.@]*)[^=]*(=|$)", given)
        if key is None or (not key[2] and not given.startswith("~")):
            raise UserError(f"{given!r} is no setting; give KEY=VALUE, such as model=vggt-mini")
        if not given.startswith(("+", "hydra.")) and key[1] not in known:
            raise UserError(f"unknown setting {key[1]!r} in {given!r}{meant(key[1], known)}; --cfg shows all of them")


def settings_of(name: str) -> list[str]:
    """Settings at the top of a configuration, those of the files that it is made of included."""
    import yaml

    found: dict[str, None] = {}
    text = yaml.safe_load(files(CONFIGS).joinpath(f"{name}.yaml").read_text())
    for key, value in text.items():
        if key != "defaults":
            found[str(key)] = None
            continue
        for entry in value:
            if isinstance(entry, dict):  # a group and the preset that is taken
                found |= dict.fromkeys(str(group).split()[-1] for group in entry)
            elif entry != "_self_":
                found |= dict.fromkeys(settings_of(entry))
    return list(found)
