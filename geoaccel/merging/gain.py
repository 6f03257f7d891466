"""The rule that leaves tokens dense if merging gains too little: the predicted speedup of a whole forward.

The gain is dense over accelerated time, end to end with all heads. Times are sums over the cost model
(:mod:`geoaccel.cost`) and the work of the method itself (:class:`Extra`), each at a rate of this machine
(:mod:`geoaccel.merging.calibration`). It depends on the number of frames and the grid, not on image content, so that
all layers of a forward make the same decision without synchronising with the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from geoaccel.cost import (
    EMBEDDING,
    ENCODER,
    ENCODER_PRODUCTS,
    FRAME,
    FRAME_PRODUCTS,
    GLOBAL,
    HEADS,
    PRODUCTS,
    Cost,
    Trunk,
)
from geoaccel.layout import TokenLayout
from geoaccel.merging.calibration import rates_for
from geoaccel.merging.rates import Kind, Rates

MIN_GAIN = 1.15

ERROR = 1.05
"""Predicted over measured speedup: nine of ten predictions for 4 to 16 frames of validation scenes overestimated by
less than this (two small networks, built-in rates). Predictions must exceed the minimum by this factor."""


@dataclass(frozen=True)
class Setting:
    """The network in which a method acts.

    Attributes:
        trunk: Its sizes.
        head_work: FLOPs of all heads per patch.
        packed_from: Fraction of the encoder's blocks before the packer.
    """

    trunk: Trunk
    head_work: float = 0.0
    packed_from: float = 1.0

    def cost(self, layout: TokenLayout) -> Cost:
        """FLOPs of a dense forward of one scene."""
        size = (layout.grid[0] * self.trunk.patch_size, layout.grid[1] * self.trunk.patch_size)
        return self.trunk.cost(layout.frames, size, heads=self.head_work * layout.frames * layout.num_patches)


@dataclass(frozen=True)
class Extra:
    """Overhead of a method for one scene, as counts of operations.

    Attributes:
        pairs: Pairs of tokens and targets compared over all channels.
        head_pairs: The same over the channels of one head, summed over heads.
        merged: Token channels whose queries, keys and values are merged, in groups shared by all heads.
        merged_heads: The same in groups per head, with outliers taken out.
        packed: Token channels of the stream that are averaged or copied back.
        read: Numbers gathered or read.
        products: Multiply-adds in linear layers and convolutions; below 0 if some are saved.
        attended: Pairs of queries and keys of a head.
        operations: Operations launched.
    """

    pairs: float = 0.0
    head_pairs: float = 0.0
    merged: float = 0.0
    merged_heads: float = 0.0
    packed: float = 0.0
    read: float = 0.0
    products: float = 0.0
    attended: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Extra) -> Extra:
        return Extra(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def shared(self, layers: int) -> Extra:
        """The share of one layer."""
        return Extra(*(getattr(self, f.name) / layers for f in fields(self)))

    def seconds(self, rates: Rates) -> float:
        """Its time."""
        return (
            self.pairs * rates.match
            + self.head_pairs * rates.match_heads
            + self.merged * rates.merge
            + self.merged_heads * rates.merge_heads
            + self.packed * rates.pack
            + self.read * rates.read
            + self.products * rates.linear
            + self.attended * rates.attend
            + self.operations * rates.start
        )


@dataclass(frozen=True)
class Work:
    """Work of one global attention of one scene with a method.

    Attributes:
        tokens: N without merging.
        queries, keys: Numbers left of each.
        extra: Overhead of the method.
    """

    tokens: float
    queries: float
    keys: float
    extra: Extra = field(default_factory=Extra)


def attention_gain(work: Work, layout: TokenLayout, kind: Kind, setting: Setting | None = None) -> float:
    """Dense over merged time of a forward with a method in every global attention.

    Args:
        work: Work of one of the attentions.
        layout: The dense layout.
        kind: Kind of the rates.
        setting: The network; None: the attention alone.
    """
    rates = rates_for(kind)
    if setting is None:
        cost, layers = Cost(round(work.tokens), {PRODUCTS: 4.0 * kind.width * work.tokens**2}), 1
    else:
        cost, layers = setting.cost(layout), setting.trunk.global_blocks
        kept = work.tokens / layout.tokens_per_scene
        if kept < 1:  # on packed rows
            cost = cost.packed(kept, encoder=1 - setting.packed_from)
    merged = cost.merged(work.queries / work.tokens, work.keys / work.tokens)
    after = seconds(merged, rates, kind.head_dim) + layers * work.extra.seconds(rates)
    return seconds(cost, rates, kind.head_dim) / after


def packing_gain(kept: float, extra: Extra, layout: TokenLayout, kind: Kind, setting: Setting) -> float:
    """Dense over packed time of a forward with a method on the token stream.

    Args:
        kept: Fraction of the tokens left after the packer.
        extra: Overhead of the method.
        layout: The dense layout.
        kind: Kind of the rates.
        setting: The network, with the position of the packer.
    """
    rates, cost = rates_for(kind), setting.cost(layout)
    packed = cost.packed(kept, encoder=1 - setting.packed_from)
    after = seconds(packed, rates, kind.head_dim) + extra.seconds(rates)
    return seconds(cost, rates, kind.head_dim) / after


def seconds(cost: Cost, rates: Rates, head_dim: int) -> float:
    """Time of a forward, summed over its parts."""
    multiply_add = {
        EMBEDDING: rates.linear,
        ENCODER: rates.linear,
        FRAME: rates.linear,
        GLOBAL: rates.linear,
        HEADS: rates.heads,
        # Two products of D multiply-adds for each query and key of a head.
        ENCODER_PRODUCTS: rates.attend_frames / (2 * head_dim),
        FRAME_PRODUCTS: rates.attend_frames / (2 * head_dim),
        PRODUCTS: rates.attend / (2 * head_dim),
    }
    return sum(flops / 2 * multiply_add[name] for name, flops in cost.parts.items())


def too_little(gain: float, min_gain: float) -> str | None:
    """Why a method leaves tokens dense; None if the predicted gain is enough, with a margin for prediction error."""
    needed = min_gain * ERROR if min_gain > 1 else 1
    if gain >= needed and gain > 1:  # at 1 no time is saved
        return None
    said = f"{math.floor(100 * gain) / 100:.2f}x predicted"
    if gain < min_gain or gain <= 1:
        return f"{said}, below min_gain={min_gain:g}"
    return f"{said}, which may be too high by {100 * (ERROR - 1):.0f} % and below min_gain={min_gain:g}"
