"""Choices for a layer of global attention, and their costs.

Costs are those by which methods decide whether to act (:mod:`geoaccel.merging.gain`), at the rates of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from geoaccel.cost import PRODUCTS
from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.calibration import rates_for
from geoaccel.merging.frames import FirstFrameLayer, FrameLayer
from geoaccel.merging.gain import MIN_GAIN, Setting, Work, seconds
from geoaccel.merging.httm import HTTM
from geoaccel.merging.method import AttentionMerging
from geoaccel.merging.rates import Kind

STRIDES = (2, 3, 4, 6, 8, 16, 32, 64)
DENSE = "dense"

CHOICES: Mapping[str, AttentionMerging | None] = {
    DENSE: None,
    **{f"stride {stride}": Asymmetric(stride=stride, min_gain=1.0) for stride in STRIDES},
    "httm": HTTM(min_gain=1.0),
    FirstFrameLayer.name: FirstFrameLayer(),
    FrameLayer.name: FrameLayer(),
}
"""By name, in the order of the figure; ties go to the earlier one. In a plan they act if they save any time: a single
layer never makes the whole forward much faster."""


def acting(method: AttentionMerging | None) -> AttentionMerging | None:
    """The same method without bypass: errors are those of the active method."""
    return None if method is None else dataclasses.replace(method, bypass=False, min_gain=MIN_GAIN)


def attention_seconds(method: AttentionMerging | None, layout: TokenLayout, kind: Kind, setting: Setting) -> float:
    """Time of one global attention over one scene, including all that a method adds or saves.

    Args:
        method: One of ``CHOICES``; None for dense attention.
        layout: Token layout of the scene.
        kind: Device, dtype and sizes of the attention.
        setting: The network that it is in.
    """
    rates, tokens = rates_for(kind), layout.tokens_per_scene
    heads = kind.width // kind.head_dim
    work = Work(tokens, tokens, tokens)
    if method is not None:
        mixer: Any = method.mixer(kind.kernel)
        mixer.setting = setting
        # Methods read only shape and device of the queries; a single number is stored.
        one = torch.zeros((), device=kind.device)
        work = mixer.work(layout, one.expand(layout.batch, heads, tokens, kind.head_dim))
    return heads * work.queries * work.keys * rates.attend + work.extra.seconds(rates)


@dataclass(frozen=True)
class Costs:
    """Predicted seconds of a forward.

    Attributes:
        rest: Everything except global attention.
        layers: Per layer of global attention, by choice.
    """

    rest: float
    layers: list[dict[str, float]]

    def forward(self, chosen: Iterable[str]) -> float:
        """Cost of a forward with a choice for each layer."""
        return self.rest + sum(row[name] for row, name in zip(self.layers, chosen, strict=True))

    @property
    def dense(self) -> float:
        """Cost of the dense forward."""
        return self.forward([DENSE] * len(self.layers))

    @property
    def least(self) -> float:
        """Cost of the forward with the cheapest choices."""
        return self.rest + sum(min(row.values()) for row in self.layers)


def costs(model: nn.Module, frames: int, size: tuple[int, int]) -> Costs:
    """Costs of every choice in every layer.

    Args:
        model: One of ours, on the device where it will run.
        frames: S.
        size: (H, W).
    """
    network: Any = model
    cost, trunk = network.cost(frames, size), network.trunk
    grid = (size[0] // trunk.patch_size, size[1] // trunk.patch_size)
    layout = TokenLayout(1, frames, grid, trunk.special)
    weight: Any = model.get_submodule(network.backbone.patch_embedding).weight
    setting, layers, kind = Setting(trunk), [], None
    for site in network.backbone.sites(model)["global"]:
        kind = Kind(weight.device, weight.dtype, site.num_heads * site.head_dim, site.head_dim)
        alone = {name: attention_seconds(method, layout, kind, setting) for name, method in CHOICES.items()}
        layers.append(alone)
    assert kind is not None
    rest = replace(cost, parts={name: value for name, value in cost.parts.items() if name != PRODUCTS})
    return Costs(seconds(rest, rates_for(kind), kind.head_dim), layers)
