"""One merge plan for all heads: what FastVGGT and LiteVGGT share.

Queries, keys and values are merged after the rotary embedding, heads side by side, with the plan that cosine matching
of the attention's input gives; attention and its output projection run on M tokens; the result is copied back to N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, Restore, attend
from geoaccel.layout import TokenLayout
from geoaccel.merging.bypass import Work, why_dense
from geoaccel.merging.method import (
    AttentionMerging,
    Effect,
    MergingMixer,
    check_share,
    release_inputs,
    require_finite_images,
)
from geoaccel.merging.partition import Assignment, Partition, assign, num_cells, released_match
from geoaccel.similarity import best_match


@dataclass(frozen=True)
class JointMerging(AttentionMerging):
    """Knobs of a method with one plan for all heads.

    Attributes:
        ratio: Share of all tokens that is asked to disappear. Targets and protected tokens never do, so that no more
            than about two thirds can; the effect says how many did. Where fewer are asked for, the sources that are
            least like their target stay alone.
        protect: Share of the tokens that stay alone.
        anchor: Every token of the first frame is a target. pi3 has no reference frame and may do without.
        log_bias: Count a merged key as the tokens that it stands for (proportional attention). Not published with these
            methods, and better: see their files.
        released_code: Choose tokens exactly as the published code does, for weights that were trained with it.
        bypass: Attend to everything where merging would not pay.
    """

    ratio: float = 0.9
    protect: float = 0.1
    anchor: bool = True
    log_bias: bool = False
    released_code: bool = False
    bypass: bool = True

    def __post_init__(self) -> None:
        check_share(self, ratio=self.ratio, protect=self.protect)
        if self.released_code and not self.anchor:
            raise ValueError(f"{self.name}: the released code knows no anchor=False; drop one of the two")

    def mixer(self, kernel: str) -> JointMixer:
        return JointMixer(self, kernel)

    def partition(self, context: AttentionContext, layout: TokenLayout, device: torch.device) -> Partition:
        """Targets, protected tokens and sources of one forward, in 1 or B rows."""
        raise NotImplementedError

    def preparation(self, layout: TokenLayout, width: int) -> float:
        """Multiply-adds that the partition of one scene takes, at C = ``width``."""
        return 0.0


class JointMixer(MergingMixer):
    """Merges, attends, and copies back after the projection.

    Args:
        method: Whose knobs it follows.
        kernel: A name from ``geoaccel.attention.KERNELS``.
        refresh: Sources look for their targets anew; otherwise they keep those of the layer before.
        depth: Layers that share one partition.
    """

    method: JointMerging

    def __init__(self, method: JointMerging, kernel: str, *, refresh: bool = True, depth: int = 1) -> None:
        super().__init__(method, kernel)
        self.refresh = refresh
        self.depth = depth

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = dense_layout(self.method, q, context)
        require_finite_images(context.state)
        why = self.why_dense(layout, q)
        if why is not None:
            return self.dense(q, k, v, x, context, why)
        assignment = self.assignment(x, layout, context)
        q, k, v = (assignment.merge(t.transpose(1, 2).flatten(2)).unflatten(-1, t.shape[1::2]) for t in (q, k, v))
        short = [t.transpose(1, 2) for t in (q, k, v)]
        if self.method.log_bias:
            scenes = zip(*(t.split(1) for t in short), assignment.plan.log_counts, strict=True)
            mixed = torch.cat([attend(*scene, key_bias=bias, kernel=self.kernel) for *scene, bias in scenes])
        else:
            mixed = attend(*short, kernel=self.kernel)
        self.effect = Effect(layout.tokens_per_scene, assignment.length, assignment.length)
        return mixed, assignment.unmerge

    def why_dense(self, layout: TokenLayout, q: Tensor) -> str | None:  # q [B, A, N, D]
        """Why everything is attended to; None where tokens are merged."""
        method, tokens = self.method, layout.tokens_per_scene
        others = layout.frames - int(method.anchor)
        targets = tokens - others * (layout.num_patches - num_cells(layout.grid))
        sources = tokens - targets - int(method.protect * others * layout.num_patches)
        merged = min(sources, int(method.ratio * tokens))
        if int(method.ratio * tokens) == 0:
            return f"ratio {method.ratio:g}"
        if layout.frames == 1:
            return "one frame"
        if sources <= 0:
            return "no token may be merged"
        if method.released_code and layout.batch > 1:
            raise ValueError(
                f"{method.name}: released_code=True is defined for one scene, got a batch of {layout.batch}; "
                "call the model for each scene"
            )
        pairs = sources * targets if self.refresh else 0
        other = method.preparation(layout, q.shape[1] * q.shape[3]) / self.depth
        left = tokens - merged
        work = Work(tokens, left, left, pairs, q.shape[1], q.shape[3], other)
        return why_dense(work, q.device.type) if method.bypass else None

    @torch.no_grad()
    def assignment(self, x: Tensor, layout: TokenLayout, context: AttentionContext) -> Assignment:
        """The groups of this layer."""
        notes: dict[str, Any] = context.state.setdefault(self.method.name, {})
        if "partition" not in notes:
            notes["partition"] = self.method.partition(context, layout, x.device).expand(layout.batch)
            release_inputs(context.state)
        if self.refresh or "assignment" not in notes:
            match = released_match if self.method.released_code else best_match
            most = int(self.method.ratio * layout.tokens_per_scene)
            notes["assignment"] = assign(notes["partition"], x, most, match=match)
        return notes["assignment"]


def dense_layout(method: AttentionMerging, q: Tensor, context: AttentionContext) -> TokenLayout:  # q [B, A, N, D]
    """The layout of the scenes that a global attention sees.

    Raises:
        ValueError: If it sees anything else.
    """
    layout = context.layout
    if layout is None or context.lengths is not None or q.shape[2] != layout.tokens_per_scene:
        raise ValueError(f"{method.name} merges the dense tokens of whole scenes, in global attention only")
    return layout
