"""The verbs: put methods into a model's slots, take them out again, say what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geoaccel.attention import DENSE, KERNELS, DenseMixer, Mixer
from geoaccel.backbone import Backbone
from geoaccel.models.weights import adopt
from geoaccel.registry import Registry

MERGING: Registry[Any] = Registry("merging method")
QUANTIZATION: Registry[Any] = Registry("quantization method")


def list_merging() -> list[str]:
    """Names of the merging methods in this version."""
    return sorted(MERGING)


def list_quantization() -> list[str]:
    """Names of the quantization methods in this version."""
    return sorted(QUANTIZATION)


def accelerate(
    model: nn.Module,
    *,
    merging: str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
) -> nn.Module:
    """Return the model with other attention kernels, merged tokens or quantized weights.

    Replaces what an earlier call put in. Parameters and state-dict keys stay as they are.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), attention="sdpa")

    Args:
        model: Ours, or an upstream object, which is adopted first.
        merging: A name from :func:`list_merging`.
        quantization: A name from :func:`list_quantization`.
        attention: Kernel of every attention: ``sdpa`` (torch's fused kernels, the default) or ``matmul`` (the plain
            formula; for comparisons, and for training short sequences on a CPU).

    Raises:
        ValueError: For an unknown name.
    """
    mixer = DENSE if attention is None else DenseMixer(_known_kernel(attention))
    for registry, name in ((MERGING, merging), (QUANTIZATION, quantization)):
        if name is not None:
            registry[name]
    if not isinstance(getattr(model, "backbone", None), Backbone):
        model = adopt(model)
    restore(model)
    for site in _attentions(model):
        site.mixer = mixer
    return model


def restore(model: nn.Module) -> nn.Module:
    """Make the model dense again, bit for bit; in place."""
    for site in _attentions(model):
        site.mixer = DENSE
    return model


def place_mixer(model: nn.Module, mixer: Mixer, kind: str = "global") -> nn.Module:
    """Put one mixer into every attention of a kind; for experiments and controls.

    Args:
        model: One of ours.
        mixer: Used by all sites.
        kind: ``encoder``, ``frame`` or ``global``.

    Raises:
        ValueError: For an unknown kind.
    """
    for site in Registry("kind of attention", _backbone(model).sites(model))[kind]:
        site.mixer = mixer  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found; prints as text."""

    backbone: str
    parameters: int
    dtypes: dict[str, int]
    device: str
    heads: tuple[str, ...]
    mixers: dict[str, dict[str, int]]

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes.items())
        lines = [f"{self.backbone}: {self.parameters:,} parameters ({dtypes}) on {self.device}"]
        lines.append(f"heads: {', '.join(self.heads)}")
        for kind, mixers in self.mixers.items():
            listing = ", ".join(f"{count} x {mixer}" for mixer, count in mixers.items())
            lines.append(f"{kind} attention: {listing}")
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """Say what acts where."""
    backbone = _backbone(model)
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    mixers = {kind: dict(Counter(repr(site.mixer) for site in sites)) for kind, sites in backbone.sites(model).items()}
    return Description(
        backbone=backbone.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtypes=dict(dtypes),
        device=str(next(model.parameters(), torch.empty(0)).device),
        heads=tuple(model.heads),  # type: ignore[arg-type]
        mixers=mixers,
    )


def _attentions(model: nn.Module) -> Iterator[Any]:
    """Every module with a mixer slot, those of the heads included."""
    return (module for module in model.modules() if hasattr(module, "mixer"))


def _backbone(model: nn.Module) -> Backbone:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise ValueError(f"a {type(model).__name__} is no geoaccel model; wrap it with geoaccel.adopt(model) first")
    return backbone


def _known_kernel(name: str) -> str:
    KERNELS[name]
    return name
