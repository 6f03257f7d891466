"""What a layer of global attention may do, and what it then costs.

Costs come from :func:`attention_work` and from nowhere else: a better model of the device changes that function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from geoaccel.cost import PRODUCTS
from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.bypass import Work
from geoaccel.merging.frames import FirstFrameLayer, FrameLayer
from geoaccel.merging.httm import HEAD_COMPARISON, HEAD_COPY, HEAD_START, HTTM
from geoaccel.merging.method import AttentionMerging
from geoaccel.merging.temporal import num_blocks

STRIDES = (2, 4, 8, 16, 32, 64)
DENSE = "dense"

CHOICES: Mapping[str, AttentionMerging | None] = {
    DENSE: None,
    **{f"stride {stride}": Asymmetric(stride=stride) for stride in STRIDES},
    "httm": HTTM(),
    FirstFrameLayer.name: FirstFrameLayer(),
    FrameLayer.name: FrameLayer(),
}
"""By name, in the order of the picture; ties go to the earlier one."""


def acting(method: AttentionMerging | None) -> AttentionMerging | None:
    """The same method where it would be bypassed: errors are those of what acts."""
    given: Any = method
    if method is None or "bypass" not in {knob.name for knob in dataclasses.fields(method)}:
        return method
    forced: AttentionMerging = dataclasses.replace(given, bypass=False)
    return forced


def attention_work(
    method: AttentionMerging | None, layout: TokenLayout, heads: int, head_dim: int, device_type: str
) -> float:
    """Multiply-adds of one global attention over one scene, with all that a method adds.

    Args:
        method: Of ``CHOICES``; None for dense attention.
        layout: Of the scene.
        heads, head_dim: A and D.
        device_type: ``cpu``, ``cuda``.
    """
    tokens, frames, special = layout.tokens_per_scene, layout.frames, layout.num_special
    patches = tokens - frames * special
    queries, keys, similarities, other = float(tokens), float(tokens), 0.0, 0.0
    if isinstance(method, Asymmetric):
        anchored = patches / frames if method.anchor else 0.0
        keys = frames * special + anchored + (patches - anchored) / method.stride_for(frames)
    elif isinstance(method, FrameLayer):
        keys = tokens / frames
    elif isinstance(method, FirstFrameLayer):
        keys = tokens / frames * (2 - 1 / frames)
    elif isinstance(method, HTTM):
        anchored = patches / frames if method.anchor else 0.0
        queries = tokens - (1 - method.query_keep) * (patches - anchored)
        keys = tokens - (1 - method.key_keep) * (patches - anchored)
        runs, groups = num_blocks(layout, *method.block_size)
        shares = (method.query_keep - method.outliers, method.key_keep)
        similarities = patches**2 / (runs * groups) * sum(share * (1 - share) for share in shares)
        other = similarities * heads * HEAD_COMPARISON + tokens * heads * head_dim * HEAD_COPY
        other += HEAD_START if device_type == "cpu" else 0.0
    elif method is not None:
        raise ValueError(f"{method.name} has no cost here")
    work = Work(tokens, queries, keys, similarities, heads, head_dim, other)
    return work.dense if method is None else work.merged(device_type)


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a forward.

    Attributes:
        rest: Of everything but global attention.
        layers: Of each layer of global attention, by choice.
    """

    rest: float
    layers: list[dict[str, float]]

    def forward(self, chosen: Iterable[str]) -> float:
        """Of a forward with a choice for each layer."""
        return self.rest + sum(row[name] for row, name in zip(self.layers, chosen, strict=True))

    @property
    def dense(self) -> float:
        """Of the dense forward."""
        return self.forward([DENSE] * len(self.layers))

    @property
    def least(self) -> float:
        """Of the forward with the cheapest choices."""
        return self.rest + sum(min(row.values()) for row in self.layers)


def costs(model: nn.Module, frames: int, size: tuple[int, int]) -> Costs:
    """What every choice costs in every layer.

    Args:
        model: One of ours, where it is going to run.
        frames: S.
        size: (H, W).
    """
    network: Any = model
    cost, trunk = network.cost(frames, size), network.trunk
    grid = (size[0] // trunk.patch_size, size[1] // trunk.patch_size)
    layout = TokenLayout(1, frames, grid, trunk.special)
    device = next(model.parameters()).device.type
    layers = [
        {name: attention_work(m, layout, site.num_heads, site.head_dim, device) for name, m in CHOICES.items()}
        for site in network.backbone.sites(model)["global"]
    ]
    return Costs((cost.total - cost.parts[PRODUCTS]) / 2, layers)
