"""The base of Co-Me and ours: groups of patches become one token each, from one block of the encoder to the heads.

After one block of the image encoder, groups of patches are ranked. The lowest fraction of all groups of a scene is
replaced by one mean token each, in everything that follows: encoder, frame and global blocks, attention and MLP. The
logits of a key that represents n tokens are raised by log n (proportional attention). For the heads, a merged token is
copied to its n places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import ForwardState
from geoaccel.cost import Trunk
from geoaccel.errors import UserError
from geoaccel.knobs import whole_numbers
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.confidence import Tap
from geoaccel.merging.gain import Extra, Setting, packing_gain
from geoaccel.merging.groups import Scope, default_group, lowest, num_groups, pack_groups
from geoaccel.merging.method import Effect, MergingPacker, SpanMerging, check_share
from geoaccel.merging.rates import Kind

Variant = Literal["packed", "direct"]

SPECIAL = 5
"""Special tokens per frame, if nothing is known about the network."""

COPIES = 6
"""Number of times that all tokens are packed and unpacked, if the stream is packed once."""

OPERATIONS, FRAME_OPERATIONS = 100, 3
"""Additional small operations compared with dense: once, and for each frame in each block within frames."""


class Ranking(Protocol):
    """The order in which groups merge."""

    def __call__(
        self,
        patches: Tensor,  # [B, S, h * w, C]
        grid: tuple[int, int],
        group: tuple[int, int],
    ) -> Tensor:  # [B, S, gh, gw]
        """A score for every group; the lowest merge."""
        ...

    def work(self, patches: int, kind: Kind) -> Extra:
        """Work for this many patches of one scene."""
        ...


@dataclass(frozen=True)
class GroupMerging(SpanMerging):
    """Knobs of a method that merges groups of patches.

    Attributes:
        ratio: p, the fraction of groups merged into one token each. At 0.5 with groups of nine, 44 % of the tokens
            disappear; the actual number is in the effect.
        group: (height, width) of a group in patches; None: 3 x 3, and 2 x 2 where the grid is small.
        tap: Index of the encoder block after which tokens are merged; None: after 15 / 24 of the encoder.
        variant: ``packed`` merges the stream once; ``direct`` merges before every attention and every MLP, and each
            token keeps its own residual.
        scope: Whether groups compete over the whole ``scene`` or within their ``frame``.
        log_bias: Weight a merged key by the number of tokens that it represents (proportional attention).
        anchor: Leave the first frame dense; ``ratio`` then applies to the groups of the others. VGGT expresses all
            cameras relative to that frame, and with it the cameras of vggt-mini stay closer to the dense ones
            (docs/results/merging.md); pi3 has no reference frame.
    """

    ratio: float = 0.5
    group: tuple[int, int] | None = None
    tap: int | None = None
    variant: Variant = "packed"
    scope: Scope = "scene"
    log_bias: bool = True
    anchor: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, ratio=self.ratio)
        if self.group is None:
            return
        group = whole_numbers(self.group)
        if group is None or len(group) != 2 or min(group) < 1 or group == (1, 1):
            raise UserError(f"{self.name}: group={self.group} must be (height, width), at least two patches in all")
        object.__setattr__(self, "group", group)

    def group_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a group on a grid of patches."""
        return self.group or default_group(grid)

    def ranking(self, tap: Tap) -> Ranking:
        """The order in which groups merge.

        Raises:
            ValueError: If the tokens at the tap cannot be ranked.
        """
        raise NotImplementedError

    @torch.inference_mode(False)  # parameters created in inference mode could not be cast later
    def packer(self, model: nn.Module) -> GroupPacker:
        tap = Tap.of(model, self.tap)
        return GroupPacker(self, Span.of(model, tap), self.ranking(tap))


@dataclass(frozen=True)
class Span:
    """The part of a backbone that runs on merged tokens.

    Attributes:
        layer: Index of the encoder block before it.
        within, across: Blocks that attend within frames, and over the whole scene.
        heads, head_dim: A and D.
    """

    layer: int
    within: int
    across: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, model: nn.Module, tap: Tap) -> Span:
        sites: Any = model.backbone.sites(model)  # type: ignore[operator, union-attr]
        within = tap.depth - 1 - tap.layer + len(sites["frame"])
        first = sites["global"][0]
        return cls(tap.layer, within, len(sites["global"]), first.num_heads, first.head_dim)

    @property
    def alone(self) -> Setting:
        """A setting of this part alone."""
        width = self.heads * self.head_dim
        return Setting(Trunk(width, 1, 0, self.within, self.across, encoder_special=0, special=SPECIAL))


class GroupPacker(MergingPacker):
    """Merges the tokens of one model.

    Attributes:
        method: The method with its knobs.
        span: The part of the network that runs on merged tokens.
        ranking: The order in which groups merge.
        effect: Effect in the last forward; None before the first.
    """

    method: GroupMerging

    def __init__(self, method: GroupMerging, span: Span, ranking: Ranking) -> None:
        super().__init__(method, span.layer)
        self.span = span
        self.ranking = ranking

    def __call__(self, x: Tensor, layout: TokenLayout, state: ForwardState) -> tuple[Tensor, Packing] | None:
        method, tokens = self.method, layout.tokens_per_scene
        why = "ratio 0 merges nothing" if method.ratio == 0 else None
        if method.anchor and layout.frames == 1:
            why = "the only frame is the anchor"
        why, gain = method.verdict(why, lambda: self.predicted(layout, x))
        if why is not None:
            self.effect = Effect(tokens, tokens, tokens, why, gain)
            return None
        group, anchors = method.group_on(layout.grid), int(method.anchor)
        scores = self.ranking(x[:, :, layout.num_special :], layout.grid, group)
        flags = F.pad(lowest(scores[:, anchors:], method.ratio, method.scope), (0, 0, 0, 0, anchors, 0))
        packing = pack_groups(layout, group, flags, weigh_keys=method.log_bias)
        rows = len(packing.weight) / layout.batch
        # The decision used the average size of groups; the report uses the sizes of the chosen ones.
        self.effect = Effect(tokens, rows, rows, gain=self.predicted(layout, x, rows / tokens))
        return (packing.pack(x) if method.variant == "packed" else x), packing

    @property
    def weighed(self) -> bool:
        """Whether keys are weighted."""
        return self.method.log_bias

    @property
    def in_every_block(self) -> bool:
        """Whether tokens are packed for each block by itself, which then takes all of them at once."""
        return self.method.variant != "packed"

    def share(self, layout: TokenLayout, device: torch.device, dtype: torch.dtype) -> float:
        method = self.method
        alone = method.ratio == 0 or (method.anchor and layout.frames == 1)
        like = torch.empty(0, device=device, dtype=dtype)
        dense = alone or method.variant != "packed" or method.too_little(self.predicted(layout, like)) is not None
        return 1.0 if dense else self.kept(layout)

    def kept(self, layout: TokenLayout) -> float:
        """Fraction of the tokens left, as if all groups were equally likely to merge."""
        method, frames = self.method, layout.frames
        groups = math.prod(num_groups(layout.grid, method.group_on(layout.grid)))
        saved = method.ratio * (layout.num_patches - groups)
        return 1 - saved * (frames - int(method.anchor)) / frames / layout.tokens_per_frame

    def predicted(self, layout: TokenLayout, x: Tensor, kept: float | None = None) -> float:
        """Predicted speedup.

        Args:
            layout: The dense layout.
            x: [B, S, P, C], for its device and dtype.
            kept: Fraction of the tokens left; None: as if all groups were equally likely to merge.
        """
        method, span = self.method, self.span
        width = span.heads * span.head_dim
        kind = Kind(x.device, x.dtype, width, span.head_dim)
        frames, patches = layout.frames, layout.num_patches
        kept = self.kept(layout) if kept is None else kept
        # Rows are packed once and unpacked for every layer that heads read, or at every step; frames of unequal length
        # need one kernel call each.
        copies = COPIES if method.variant == "packed" else 4 * (span.within + span.across)
        starts = OPERATIONS + FRAME_OPERATIONS * frames * span.within
        extra = Extra(packed=layout.tokens_per_scene * width * copies, operations=starts)
        extra += self.ranking.work(frames * patches, kind)
        return packing_gain(kept, extra, layout, kind, self.setting or span.alone)
