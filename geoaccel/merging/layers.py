"""A method, or none, for each layer of global attention: ``accelerate(model, layers={...})``.

    geoaccel.accelerate(model, layers={"0-8": "frame-only", "9-23": Asymmetric(stride=4)})
    geoaccel.accelerate(model, merging="httm", layers={0: None})  # httm in all layers but the first
    geoaccel.accelerate(model, layers="saf3r")  # a preset

A layer is a number from 0, or several as ``9-23``, ``9-`` (to the last one) or ``range(9, 24)``. A method is what
``merging`` takes for global attention, ``frame-only`` or ``first-frame`` (:mod:`geoaccel.merging.frames`), or None for
dense attention; with knobs it may also be a mapping, as in settings files: ``{asymmetric: {stride: 4}}``. Layers that
are not named keep the method of ``merging``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from geoaccel.attention import DenseMixer, Mixer
from geoaccel.errors import UserError, UserTypeError
from geoaccel.merging.frames import FirstFrameLayer, FrameLayer
from geoaccel.merging.method import MERGING, AttentionMerging, Merging
from geoaccel.registry import Registry, make, unknown

SINGLE: Registry[Callable[..., AttentionMerging]] = Registry(
    "choice for a layer", {FrameLayer.name: FrameLayer, FirstFrameLayer.name: FirstFrameLayer}
)
"""Choices for single layers in addition to the methods of ``MERGING``."""

DENSE_NAMES = ("none", "dense")


@dataclass(frozen=True)
class Preset:
    """A named assignment of layers.

    Attributes:
        depth: Number of global attentions of the network that it is for.
        layers: As :func:`geoaccel.accelerate` takes them.
        about: Its source.
    """

    depth: int
    layers: Mapping[Any, Any]
    about: str


PRESETS: Registry[Preset] = Registry(
    "preset of layers",
    {
        "saf3r": Preset(
            24,
            {"0-8": {"first-frame": {"own": False}}, "9-23": {"asymmetric": {"stride": 4}}},
            "SAF3R's finding on VGGT-1B, from the literature and not measured here: in layers 0 to 8 most heads need "
            "the first frame alone (or one key in 128), in layers 9 to 23 one key in 4. SAF3R chooses for every head "
            "and has other kinds besides; this is the rule by layers, with the keys of asymmetric.",
        )
    },
)
"""Presets by name."""


@dataclass(frozen=True)
class Layers:
    """The methods of single layers; the others follow ``merging``.

    Attributes:
        entries: First layer, last one (None: the network's last), and the method; None leaves attention dense.
        preset: Name and depth of the preset, if it is one.
    """

    entries: tuple[tuple[int, int | None, AttentionMerging | None], ...] = ()
    preset: tuple[str, int] | None = None

    @classmethod
    def read(cls, given: Any) -> Layers:
        """Parse the argument ``layers``.

        Args:
            given: A mapping, the name of a preset, or None.

        Raises:
            ValueError: For anything else, an invalid layer, or a method that cannot act in single layers.
        """
        if given is None or isinstance(given, Layers):
            return given or cls()
        if isinstance(given, str):
            preset = PRESETS[given]
            return dataclasses.replace(cls.read(preset.layers), preset=(given, preset.depth))
        if not isinstance(given, Mapping):
            raise UserTypeError(
                f"layers={given!r}: give layers with methods, as {{'0-8': 'frame-only', 9: 'httm'}}, or a preset: "
                f"{', '.join(PRESETS)}"
            )
        return cls(tuple((*_span(key), layer_method(value)) for key, value in given.items()))

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def methods(self) -> list[AttentionMerging]:
        """Every method once."""
        return list(dict.fromkeys(method for *_, method in self.entries if method is not None))

    def each(self, depth: int, others: AttentionMerging | None = None) -> list[AttentionMerging | None]:
        """The method of each of ``depth`` layers.

        Args:
            depth: Number of global attentions of the network.
            others: The method of layers that are not named.

        Raises:
            ValueError: For a layer that the network does not have, or one that is named twice.
        """
        if self.preset is not None and self.preset[1] != depth:
            name, wanted = self.preset
            raise UserError(
                f"layers={name!r} is for {wanted} layers of global attention, this network has {depth}; name its layers"
            )
        found: dict[int, AttentionMerging | None] = {}
        for first, last, method in self.entries:
            for layer in range(first, depth if last is None else last + 1) or [first]:
                if layer >= depth:
                    raise UserError(
                        f"layers: there is no layer {layer}; this network has {depth} layers of global attention, "
                        f"0 to {depth - 1}"
                    )
                if layer in found:
                    raise UserError(f"layers: layer {layer} is given twice; give it once")
                found[layer] = method
        return [found.get(layer, others) for layer in range(depth)]

    def mixers(self, kernel: str, depth: int, others: AttentionMerging | None = None) -> list[Mixer]:
        """One mixer for each layer: a method creates mixers for all layers, used where it acts.

        Args:
            kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
            depth: Number of global attentions of the network.
            others: The method of layers that are not named.

        Raises:
            ValueError: As :meth:`each`.
        """
        chosen = self.each(depth, others)
        made = {method: method.mixers(kernel, depth) for method in chosen if method is not None}
        return [DenseMixer(kernel) if m is None else made[m][layer] for layer, m in enumerate(chosen)]


def layer_method(given: Any) -> AttentionMerging | None:
    """A method for a layer, from its name, a mapping of its name to knobs, or a method object.

    Raises:
        ValueError: If it is not a method, or acts on the token stream.
    """
    if given is None or (isinstance(given, str) and given in DENSE_NAMES):
        return None
    if isinstance(given, AttentionMerging):
        return given
    name: Any = given
    knobs: Mapping[str, Any] | None = {}
    if isinstance(given, Mapping):
        if len(given) != 1 or not isinstance(next(iter(given.values())), Mapping | None):
            raise UserError(
                f"layers: {dict(given)!r} is not a method with knobs; give e.g. {{asymmetric: {{stride: 4}}}}"
            )
        name, knobs = next(iter(given.items()))
        if name in DENSE_NAMES:
            return None
    if not isinstance(name, str):
        raise UserTypeError(f"layers: {given!r} is not a method; give a name, a method such as HTTM(), or None")
    if name not in SINGLE and name not in MERGING:
        raise UserError(unknown("method of a layer", name, [*DENSE_NAMES[:1], *SINGLE, *MERGING]))
    method: Merging = make(SINGLE, name, knobs or {}) if name in SINGLE else make(MERGING, name, knobs or {})
    if not isinstance(method, AttentionMerging):
        raise UserError(f"layers: {name} acts on the {method.place} and not in single layers; give it as merging")
    return method


def plain(method: AttentionMerging | None) -> Any:
    """A method as plain data, which :func:`layer_method` reads back: its name, with changed knobs if any."""
    if method is None:
        return "none"
    default = layer_method(method.name)
    knobs = {
        knob.name: list(value) if isinstance(value, tuple) else value
        for knob in dataclasses.fields(method)
        if (value := getattr(method, knob.name)) != getattr(default, knob.name)
    }
    return {method.name: knobs} if knobs else method.name


def named(layers: list[int]) -> str:
    """Layers as text, in the input format: ``0-8, 11``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _span(key: Any) -> tuple[int, int | None]:
    """First and last layer that a key names."""
    first: int
    last: int | None
    if isinstance(key, range) and key.step == 1 and len(key):
        first, last = key.start, key.stop - 1
    elif isinstance(key, int) and not isinstance(key, bool):
        first = last = key
    elif isinstance(key, str) and (match := re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*)\s*)?", key)):
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else None
    else:
        raise UserError(f"layers: {key!r} is not a layer; give a number from 0, or several as '0-8' or '9-'")
    if first < 0 or (last is not None and last < first):
        raise UserError(f"layers: {key!r} is not a range of layers; count from 0, the smaller number first")
    return first, last


def read_layers(text: str | None) -> Layers:
    """Layers as the command line gives them: a mapping in YAML, or the name of a preset.

    Raises:
        ValueError: If it does not parse, or as `Layers.read`.
    """
    import yaml

    try:
        return Layers.read(None if text is None else yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"--layers {text} is not valid YAML; give e.g. '{{0-8: frame-only, 9-23: httm}}'") from None
