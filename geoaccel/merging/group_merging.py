"""The base of Co-Me and ours: groups of patches become one token each, from one block of the encoder to the heads.

The network is cut in two behind a block of the image encoder, where groups of patches are ranked. The lowest share of
all groups of a scene is replaced by one mean token each, in everything that follows: encoder, frame and global blocks,
attention and MLP. Keys that stand for n tokens get log n on their logits. Where a head reads, a merged token is copied
to its n places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import ForwardState
from geoaccel.errors import UserError
from geoaccel.knobs import whole_numbers
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.bypass import COPY, EXPONENTIAL, START, START_ELSEWHERE
from geoaccel.merging.confidence import Tap
from geoaccel.merging.groups import Scope, default_group, lowest, num_groups, pack_groups
from geoaccel.merging.method import Effect, MergingPacker, SpanMerging, check_share

Variant = Literal["packed", "direct"]


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

    def work(self, patches: int, width: int) -> float:
        """Multiply-adds for so many patches of one scene, at C = ``width``."""
        ...


@dataclass(frozen=True)
class GroupMerging(SpanMerging):
    """Knobs of a method that merges groups of patches.

    Attributes:
        ratio: p, the share of groups that become one token each. At 0.5 in groups of nine, 44 % of tokens disappear;
            what really happened is in the effect.
        group: (height, width) of a group in patches; None: 3 x 3, and 2 x 2 where the grid is small.
        tap: Index of the encoder block behind which tokens are merged; None: after 15 / 24 of the encoder.
        variant: ``packed`` merges the stream once; ``direct`` merges in front of every attention and every MLP and
            lets each token keep its own residual.
        scope: Whether groups compete over the whole ``scene`` or within their ``frame``.
        log_bias: Count a merged key as the tokens that it stands for (proportional attention).
        anchor: Leave the first frame as it is; ``ratio`` is of the groups of the others. VGGT refers all cameras to it,
            and vggt-mini's come closer to the dense ones (README); pi3 has no reference frame.
        bypass: Leave tokens dense where merging would not pay.
    """

    ratio: float = 0.5
    group: tuple[int, int] | None = None
    tap: int | None = None
    variant: Variant = "packed"
    scope: Scope = "scene"
    log_bias: bool = True
    anchor: bool = False
    bypass: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, ratio=self.ratio)
        if self.group is None:
            return
        group = whole_numbers(self.group)
        if group is None or len(group) != 2 or min(group) < 1 or group == (1, 1):
            raise UserError(f"{self.name}: group={self.group} is not (height, width) of at least two patches together")
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

    @torch.inference_mode(False)  # parameters made in inference mode could not be cast later
    def packer(self, model: nn.Module) -> GroupPacker:
        tap = Tap.of(model, self.tap)
        return GroupPacker(self, Span.of(model, tap), self.ranking(tap))


@dataclass(frozen=True)
class Span:
    """The part of a backbone that runs on merged tokens.

    Attributes:
        layer: Index of the encoder block in front of it.
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

    def work(self, frames: int, rows: float) -> float:
        """Multiply-adds of one scene with so many rows a frame."""
        tokens, pair = frames * rows, self.heads * (2 * self.head_dim + EXPONENTIAL)
        linear = 12 * (self.heads * self.head_dim) ** 2 * tokens * (self.within + self.across)
        return linear + pair * (self.within * tokens * rows + self.across * tokens**2)


class GroupPacker(MergingPacker):
    """Merges the tokens of one model.

    Attributes:
        method: Whose knobs it follows.
        span: What runs on merged tokens.
        ranking: The order in which groups merge.
        effect: Of the last forward; None before the first.
    """

    method: GroupMerging

    def __init__(self, method: GroupMerging, span: Span, ranking: Ranking) -> None:
        super().__init__(method, span.layer)
        self.span = span
        self.ranking = ranking

    def __call__(
        self,
        x: Tensor,  # [B, S, P, C]
        layout: TokenLayout,
        state: ForwardState,
    ) -> tuple[Tensor, Packing] | None:
        method, tokens = self.method, layout.tokens_per_scene
        why = self.why_dense(layout, x.device.type)
        if why is not None:
            self.effect = Effect(tokens, tokens, tokens, why)
            return None
        group, anchors = method.group_on(layout.grid), int(method.anchor)
        scores = self.ranking(x[:, :, layout.num_special :], layout.grid, group)
        flags = F.pad(lowest(scores[:, anchors:], method.ratio, method.scope), (0, 0, 0, 0, anchors, 0))
        packing = pack_groups(layout, group, flags, weigh_keys=method.log_bias)
        rows = len(packing.weight) / layout.batch
        self.effect = Effect(tokens, rows, rows)
        return (packing.pack(x) if method.variant == "packed" else x), packing

    def why_dense(self, layout: TokenLayout, device_type: str) -> str | None:
        """Why nothing is merged; None where it is."""
        method, span = self.method, self.span
        if method.ratio == 0:
            return "ratio 0 merges nothing"
        if method.anchor and layout.frames == 1:
            return "the only frame is the anchor"
        if not method.bypass:
            return None
        frames, patches = layout.frames, layout.num_patches
        saved = method.ratio * (patches - math.prod(num_groups(layout.grid, method.group_on(layout.grid))))
        kept = layout.tokens_per_frame - saved * (frames - int(method.anchor)) / frames
        # Rows are packed once and unpacked for every layer that heads read, or at every step; the kernels of frames of
        # unequal length start one by one.
        copies = 8 if method.variant == "packed" else 4 * (span.within + span.across)
        starts = 2 + copies / 8 + frames * span.within / 10
        extra = frames * layout.tokens_per_frame * span.heads * span.head_dim * COPY * copies
        extra += starts * START.get(device_type, START_ELSEWHERE)
        extra += self.ranking.work(frames * patches, span.heads * span.head_dim)
        share = (span.work(frames, kept) + extra) / span.work(frames, layout.tokens_per_frame)
        return (
            None if share < 1 else f"merging {layout.tokens_per_scene:,} tokens would take {share:.1f} x dense blocks"
        )
