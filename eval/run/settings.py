"""Settings from Hydra overrides: ``data=synthetic model=vggt-mini merging=httm merging.httm.query_keep=0.3``.

Data presets are files in ``configs/data``. Merging and quantization methods need no file: every registered method is a
choice of its group, with its own knobs and defaults. Combine several as ``merging=[alike,httm]``.

Hydra's compose API is used rather than its main function: user errors then become one line, and sweeps
(``--multirun``, ``ratio=0.3,0.6``) run in this process with the same engine.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geoaccel.errors import UserError
from geoaccel.eval.run.overrides import CONFIGS, check_config
from geoaccel.merging.method import MERGING
from geoaccel.quantization import QUANTIZATION
from geoaccel.registry import meant

OPEN = ("knobs", "data.options")
"""Settings that accept names not in a preset; their readers check the names."""


def compose_settings(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One configuration as plain dictionaries.

    Args:
        name: File in ``configs``, without its suffix.
        overrides: As given on the command line.

    Raises:
        ValueError: For an override that does not parse, or names something that is not there.
    """
    check_config(name)
    _register_methods()
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            try:
                return to_plain(compose(name, overrides=_opened(name, overrides)))
            except (HydraException, OmegaConfBaseException) as error:
                said = _of_another_method(name, error) or _one_line(error, overrides) + _meant(name, error, overrides)
                raise UserError(said) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from None


def combinations(name: str, overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of overrides with several values, and of the configuration's own ``sweep``.

    Args:
        name: File in ``configs``, without its suffix.
        overrides: As given on the command line; they take precedence over ``sweep``.

    Raises:
        ValueError: For an override that does not parse.
    """
    given = list(sweep(overrides))
    own = compose_settings(name, [one for one in overrides if one.startswith("sweep.")]).get("sweep", {})
    named = {one.split("=", 1)[0].lstrip("+~") for one in overrides}
    lists = [[f"{key}={value}" for value in values] for key, values in own.items() if key not in named]
    return [[*more, *combination] for more in itertools.product(*lists) for combination in given]


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Dictionaries, lists and scalars, with all references resolved."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of overrides with several values (``key=a,b``, ``range(1,5)``, ``glob(*)``).

    Raises:
        ValueError: For an override that does not parse.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        choices = []
        for override in parsed:
            if override.is_sweep_override():
                key = override.get_key_element()
                choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                choices.append([override.input_line or ""])
    except HydraException as error:
        raise UserError(_one_line(error, overrides)) from None
    for combination in itertools.product(*choices):
        yield list(combination)


def section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A group of settings.

    Raises:
        ValueError: If a value was given instead.
    """
    given = settings[name]
    if not isinstance(given, Mapping):
        raise UserError(f"{name}={given!r}: this is a group of settings; give them one by one, as {name}.NAME=VALUE")
    return {str(key): value for key, value in given.items()}


def whole_number(settings: Mapping[str, Any], name: str, least: int, inside: str = "") -> int:
    """A setting that is a whole number.

    Raises:
        ValueError: If it is less than ``least``, or not a whole number.
    """
    given = settings[name]
    if type(given) is not int or given < least:
        raise UserError(f"{inside}{name}={given!r}: give a whole number, at least {least}")
    return given


def out_folder(settings: Mapping[str, Any], default: Path) -> Path:
    """The folder of results; its name may be a number, such as 2024.

    Raises:
        ValueError: For what cannot be a folder.
    """
    given = settings["out"]
    if given is None or given == "":
        return default
    if isinstance(given, bool) or not isinstance(given, str | int | float | Path):
        raise UserError(f"out={given!r}: give the path of a folder")
    return Path(str(given))


def methods_of(methods: Mapping[str, Any] | None, ratio: float | None = None) -> dict[str, dict[str, Any]]:
    """The merging or quantization methods of a configuration, with one requested ratio for all if given.

    Raises:
        ValueError: If they are not methods with their knobs.
    """
    if not isinstance(methods or {}, Mapping):
        raise UserError(f"{methods!r}: give methods by name, and knobs one by one, as merging.httm.query_keep=0.4")
    found = {name: section(methods or {}, name) for name in methods or {}}
    if ratio is not None:
        found = {name: {**knobs, "ratio": ratio} for name, knobs in found.items()}
    return found


def refuse_given(settings: Mapping[str, Any], usual: Mapping[str, Any], why: str, inside: str = "") -> None:
    """Reject settings that would have no effect, unless they have their default values.

    Args:
        settings: As given.
        usual: The settings without effect, with their defaults.
        why: Why they have no effect, and what to do; follows ``NAME=VALUE``.
        inside: Prefix of each name.

    Raises:
        ValueError: For the first one given.
    """
    for name, value in usual.items():
        if settings[name] != value:
            raise UserError(f"{inside}{name}={settings[name]} {why}")


@functools.cache
def usual_settings(name: str) -> Mapping[str, Any]:
    """A configuration without overrides; must not be modified."""
    return compose_settings(name, [])


def _opened(name: str, overrides: Sequence[str]) -> list[str]:
    """Overrides with hydra's ``++``, which also adds keys, if they are inside :data:`OPEN`."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    nodes = [_open_node(change) for change in parsed]
    if not any(nodes):
        return list(overrides)
    closed = compose(name, overrides=[one for one, node in zip(overrides, nodes, strict=True) if node is None])
    # A node that this configuration lacks is treated as a misspelt name.
    return [
        one if node is None or OmegaConf.select(closed, node) is None else f"++{one}"
        for one, node in zip(overrides, nodes, strict=True)
    ]


def _open_node(change: Override) -> str | None:
    """The entry of :data:`OPEN` that an override changes."""
    key = f"{change.key_or_group}."
    is_change = change.type is OverrideType.CHANGE
    return next((node for node in OPEN if is_change and key.startswith(f"{node}.")), None)


def _register_methods() -> None:
    store = ConfigStore.instance()
    for group, registry in (("merging", MERGING), ("quantization", QUANTIZATION)):
        store.store(name="none", group=group, node={})
        for name, method in registry.items():
            store.store(name=name, group=group, node={name: _knobs(method)})


def _knobs(method: Any) -> dict[str, Any]:
    """Knobs of a method with their defaults."""
    defaults = {name: knob.default for name, knob in inspect.signature(method).parameters.items()}
    return {name: list(default) if isinstance(default, tuple) else default for name, default in defaults.items()}


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message without decorations and links, and with the given overrides."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip(" ^~"))
    for ending in ("To append to your config use", "Config search path", "See https"):
        text = text.split(ending)[0].strip()
    if text.startswith("Could not override"):
        text += " There is no such setting; --cfg shows all of them"
    return f"cannot use {' '.join(overrides)}: {text}"


def _of_another_method(name: str, error: Exception) -> str:
    """What to say of a knob whose method is not chosen, as in a sweep over several methods; else nothing."""
    found = re.search(r"Could not override '((merging|quantization)\.([^.']+)\.[^']+)'", str(error))
    if found is None or found[2] not in compose(name):
        return ""
    key, group, method = found.groups()
    registry: Mapping[str, Any] = MERGING if group == "merging" else QUANTIZATION
    if method not in registry or key.rpartition(".")[2] not in _knobs(registry[method]):
        return ""
    return (
        f"{key} is a knob of {group}={method}, which is not chosen here; a knob is swept with its own method alone: "
        f"run the command with {group}={method}, and again for each other method; every table has the dense model's row"
    )


def _meant(name: str, error: Exception, overrides: Sequence[str]) -> str:
    """Suggestion for a key or choice that hydra does not find; called within its initialised configuration."""
    text = str(error)
    if (
        choice := re.search(r"Could not find '([^']*)/([^'/]*)'\s+Available options in '[^']*':([^:]*)", text)
    ) is not None:
        return meant(choice[2], choice[3].split("Config search path")[0].split())
    if (key := re.search(r"Could not override '([^']*)'", text)) is None:
        return ""
    others = [one for one in overrides if one.split("=", 1)[0].lstrip("+~") != key[1]]
    try:
        known = list(_keys(compose(name, overrides=_opened(name, others))))
    except (HydraException, OmegaConfBaseException):  # another error
        return ""
    return meant(key[1], known)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All settings, as ``data.root``."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            yield from _keys(value, f"{prefix}{key}.")
