"""Effects of merging in the last forward, read from the mixers and packers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from geoaccel.merging.method import Effect, MergingMixer, MergingPacker


def effects(model: nn.Module) -> Iterator[Effect]:
    """The effect of every object that merges, in the order of the network."""
    backbone: Any = model.backbone
    for sites in backbone.sites(model).values():
        for site in sites:
            if isinstance(site.mixer, MergingMixer) and site.mixer.effect is not None:
                yield site.mixer.effect
    for module in model.modules():
        packer = getattr(module, "token_packer", None)
        if isinstance(packer, MergingPacker) and packer.effect is not None:
            yield packer.effect


def all_dense(model: nn.Module) -> bool:
    """Whether every method in a model left its tokens dense in the last forward."""
    found = list(effects(model))
    return bool(found) and all(effect.bypassed is not None for effect in found)


def effective_ratio(model: nn.Module) -> float | None:
    """Mean of 1 - M / N over all places where tokens are merged; None if there are none."""
    return _mean([effect.effective_ratio for effect in effects(model)])


def effective_key_ratio(model: nn.Module) -> float | None:
    """The same for keys."""
    return _mean([effect.effective_key_ratio for effect in effects(model)])


def _mean(ratios: list[float]) -> float | None:
    return sum(ratios) / len(ratios) if ratios else None
