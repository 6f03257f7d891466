"""Co-Me: confidence-guided token merging (Chen et al., CVPR 2026, arXiv 2511.14751).

The network is cut in two behind a block of the image encoder, where groups of 3 x 3 patches are ranked. Half of all
groups of a scene are replaced by one mean token each, in everything that follows: encoder, frame and global blocks,
attention and MLP. Keys that stand for n tokens get log n on their logits. Where a head reads, a merged token is copied
to its n places.

Differs from the paper in:
    - Those groups merge whose tokens are most alike there already, so that little is lost with them. It takes no
      training. The paper merges the groups in which a small predictor expects the network to be least confident:
      ``choose="least_confident"``. By that the depth of the minis loses seven to ten times as much, and the cameras of
      vggt-mini almost twice as much (README); on the large checkpoints the two have not been compared.
    - On grids with a side of fewer than 24 patches groups are 2 x 2 unless told otherwise; the paper's have 36.
    - Any grid: groups at the lower and right edge are smaller where a side is no multiple of 3, and weigh what they
      hold. The paper needs multiples of 3.
    - A merged token stands in the exact middle of its patches, between two of them where a side is even. The released
      code truncates to integers; in groups of 2 x 2 every merged token would move by half a patch up and left.
    - The predictor's width shrinks with the backbone's below C = 1024, so that its own attention stays cheap.
    - ``direct`` merges in the same groups, where the first version of the paper took 4 patches in a row.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.knobs import check_flags, whole_numbers
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.bypass import COPY, EXPONENTIAL, START, START_ELSEWHERE
from geoaccel.merging.confidence import ConfidencePredictor, Tap, predictor_for, shipped_predictors
from geoaccel.merging.method import (
    Effect,
    SpanMerging,
    check_share,
    register,
    require_finite_images,
)

SMALL_GRID = 24
"""Patches; on a shorter side three of them are more than an eighth of the photograph, the paper's are a twelfth."""

Variant = Literal["packed", "direct"]
Choice = Literal["most_alike", "least_confident", "random", "most_confident"]
Scope = Literal["scene", "frame"]


@register
@dataclass(frozen=True)
class CoMe(SpanMerging):
    """Knobs of Co-Me.

    Attributes:
        ratio: p, the share of groups that become one token each. At 0.5 in groups of nine, 44 % of tokens disappear;
            what really happened is in the effect.
        group: (height, width) of a group in patches; None: 3 x 3, and 2 x 2 where the grid is small.
        choose: Which groups merge: the ``most_alike``, the ``least_confident`` as in the paper, or, as controls, those
            that are ``most_confident``, or ``random`` ones.
        predictor: Of the confidence: ``auto`` (the shipped one for this checkpoint), the path of one, a predictor, or
            ``untrained`` (for timing networks with random weights).
        tap: Index of the encoder block behind which tokens are merged; None: after 15 / 24 of the encoder.
        variant: ``packed`` merges the stream once; ``direct`` merges in front of every attention and every MLP and
            lets each token keep its own residual.
        scope: Whether groups compete over the whole ``scene`` or within their ``frame``.
        log_bias: Count a merged key as the tokens that it stands for.
        anchor: Leave the first frame as it is; ``ratio`` is of the groups of the others. VGGT refers all cameras to it,
            and vggt-mini's come closer to the dense ones (README); pi3 has no reference frame.
        seed: Of the random choice.
        bypass: Leave tokens dense where merging would not pay.
    """

    name: ClassVar[str] = "come"
    ratio: float = 0.5
    group: tuple[int, int] | None = None
    choose: Choice = "most_alike"
    predictor: ConfidencePredictor | str | os.PathLike[str] = "auto"
    tap: int | None = None
    variant: Variant = "packed"
    scope: Scope = "scene"
    log_bias: bool = True
    anchor: bool = False
    seed: int = 0
    bypass: bool = True

    def __post_init__(self) -> None:
        check_share(self, ratio=self.ratio)
        check_flags(self, self.name)
        for knob, kind in (("variant", Variant), ("scope", Scope), ("choose", Choice)):
            if getattr(self, knob) not in get_args(kind):
                raise UserError(f"come: {knob}={getattr(self, knob)!r}; known: {', '.join(get_args(kind))}")
        if not self.reads_confidence and self.predictor != "auto":
            raise UserError(
                f"come: choose={self.choose!r} reads no predictor, and one was given; leave it out, or take "
                "choose='least_confident'"
            )
        if self.group is None:
            return
        group = whole_numbers(self.group)
        if group is None or len(group) != 2 or min(group) < 1 or group == (1, 1):
            raise UserError(f"come: group={self.group} is not (height, width) of at least two patches together")
        object.__setattr__(self, "group", group)

    @property
    def reads_confidence(self) -> bool:
        """Whether groups are ranked by what a predictor says of them."""
        return self.choose in ("least_confident", "most_confident")

    def files(self) -> list[Path]:
        """What it reads beside its knobs: the package's predictors, of which one fits the checkpoint."""
        return shipped_predictors() if self.reads_confidence and self.predictor == "auto" else []

    def group_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a group on a grid of patches."""
        return self.group or default_group(grid)

    @torch.inference_mode(False)  # parameters made in inference mode could not be cast later
    def packer(self, model: nn.Module) -> CoMePacker:
        tap = Tap.of(model, self.tap)
        predictor = predictor_for(tap, self.predictor) if self.reads_confidence else None
        return CoMePacker(self, Span.of(model, tap), predictor)


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


class CoMePacker:
    """Merges the tokens of one model.

    Attributes:
        method: Whose knobs it follows.
        span: What runs on merged tokens.
        effect: Of the last forward; None before the first.
    """

    def __init__(self, method: CoMe, span: Span, predictor: ConfidencePredictor | None) -> None:
        self.method = method
        self.span = span
        self.effect: Effect | None = None
        # A copy: it follows the model's device and dtype.
        self._predictor = copy.deepcopy(predictor)

    @property
    def layer(self) -> int:
        """Index of the encoder block behind which it acts."""
        return self.span.layer

    def __repr__(self) -> str:
        return repr(self.method)

    def __call__(
        self,
        x: Tensor,  # [B, S, P, C]
        layout: TokenLayout,
        state: dict[Any, Any],
    ) -> tuple[Tensor, Packing] | None:
        require_finite_images(state)
        method, tokens = self.method, layout.tokens_per_scene
        why = self.why_dense(layout, x.device.type)
        if why is not None:
            self.effect = Effect(tokens, tokens, tokens, why)
            return None
        scores = self.scores(x[:, :, layout.num_special :], layout)
        anchors = int(method.anchor)
        flags = F.pad(lowest(scores[:, anchors:], method.ratio, method.scope), (0, 0, 0, 0, anchors, 0))
        packing = pack_groups(layout, method.group_on(layout.grid), flags, weigh_keys=method.log_bias)
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
        if method.choose == "most_alike":
            extra += frames * patches * span.heads * span.head_dim * COPY * 4
        if self._predictor is not None:
            extra += self._predictor.work(frames * patches)
        share = (span.work(frames, kept) + extra) / span.work(frames, layout.tokens_per_frame)
        return (
            None if share < 1 else f"merging {layout.tokens_per_scene:,} tokens would take {share:.1f} x dense blocks"
        )

    def scores(
        self,
        patches: Tensor,  # [B, S, h * w, C]
        layout: TokenLayout,
    ) -> Tensor:  # [B, S, gh, gw]
        """What each group's place in the ranking depends on; the lowest merge."""
        method = self.method
        group = method.group_on(layout.grid)
        if method.choose == "most_alike":
            return spread(patches, layout.grid, group)
        if self._predictor is None:
            generator = torch.Generator().manual_seed(method.seed)
            shape = (layout.frames, *num_groups(layout.grid, group))
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return drawn.to(patches.device).expand(layout.batch, -1, -1, -1)
        with torch.inference_mode(False):
            self._predictor.to(patches.device, patches.dtype)
        with torch.no_grad():
            means = group_means(self._predictor(patches, layout.grid), group)
        return means if method.choose == "least_confident" else -means


def default_group(grid: tuple[int, int]) -> tuple[int, int]:
    """3 x 3, and 2 x 2 on grids with a side of fewer than 24 patches."""
    return (3, 3) if min(grid) >= SMALL_GRID else (2, 2)


def num_groups(grid: tuple[int, int], group: tuple[int, int]) -> tuple[int, int]:
    """Groups along both sides of a grid, smaller ones at the edges included."""
    return -(-grid[0] // group[0]), -(-grid[1] // group[1])


def group_means(
    conf: Tensor,  # [B, S, h, w]
    group: tuple[int, int],
) -> Tensor:  # [B, S, gh, gw]
    """Mean over every group."""
    means = F.avg_pool2d(conf.flatten(0, 1)[:, None], group, ceil_mode=True, count_include_pad=False)
    return means[:, 0].unflatten(0, conf.shape[:2])


def spread(
    patches: Tensor,  # [B, S, h * w, C]
    grid: tuple[int, int],
    group: tuple[int, int],
) -> Tensor:  # [B, S, gh, gw], float32
    """Squared distance of a group's tokens from their mean, for each token that merging would save."""

    def total(values: Tensor) -> Tensor:  # [B, S, h * w, c] to [B * S, c, gh, gw]
        maps = values.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(maps.float(), group, ceil_mode=True, divisor_override=1)

    members = total(patches.new_ones(1, 1, patches.shape[2], 1))
    norms = torch.linalg.vector_norm(patches, dim=-1, keepdim=True, dtype=torch.float32)
    apart = (total(norms.square()) - total(patches).square().sum(1, keepdim=True) / members).clamp(min=0)
    # A single patch at an edge saves nothing. Quantiles are interpolated, which infinity is not fit for.
    found = (apart / (members - 1)).masked_fill(members == 1, torch.finfo(apart.dtype).max)
    return found[:, 0].unflatten(0, patches.shape[:2])


def lowest(
    scores: Tensor,  # [B, S, gh, gw]
    share: float,
    scope: Scope,
) -> Tensor:  # [B, S, gh, gw], bool
    """Groups below the quantile of all groups that they compete with."""
    threshold = scores.flatten(1 if scope == "scene" else 2).quantile(share, dim=-1)
    return scores < threshold.reshape(*threshold.shape, *[1] * (scores.ndim - threshold.ndim))


def pack_groups(
    layout: TokenLayout,
    group: tuple[int, int],
    flags: Tensor,  # [B, S, gh, gw], bool
    *,
    weigh_keys: bool = True,
) -> Packing:
    """One row for every flagged group, and one for every other token.

    A frame's rows are its special tokens, then the groups row by row, and within a group that stays its patches row by
    row.
    """
    rows = torch.arange(layout.grid[0], device=flags.device) // group[0]
    columns = torch.arange(layout.grid[1], device=flags.device) // group[1]
    group_of = (rows[:, None] * flags.shape[-1] + columns).flatten()  # [h * w]
    order = group_of.argsort(stable=True)
    group_of = group_of[order]
    first = F.pad(group_of[1:] != group_of[:-1], (1, 0), value=True)
    starts = ~flags.flatten(2)[..., group_of] | first  # [B, S, h * w], does a new row begin here?
    starts = F.pad(starts, (layout.num_special, 0), value=True)
    in_order = starts.flatten().cumsum(0).view_as(starts) - 1
    owner = in_order.clone()
    owner[..., layout.num_special + order] = in_order[..., layout.num_special :]
    return Packing.from_owner(owner, layout, weigh_keys=weigh_keys)
