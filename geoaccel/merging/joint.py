"""The base of FastVGGT and LiteVGGT: one merge plan for all heads of an attention.

Queries, keys and values are merged after the rotary embedding, identically in all heads, by cosine matching of the
attention's input; attention and its output projection run on M tokens; the result is copied back to N.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, Held, Restore, Tokens
from geoaccel.attention_kernels import attend
from geoaccel.errors import UserError
from geoaccel.layout import TokenLayout
from geoaccel.merging.gain import Extra, Work, attention_gain
from geoaccel.merging.method import (
    AttentionMerging,
    Effect,
    MergingMixer,
    check_share,
)
from geoaccel.merging.partition import Partition, num_cells
from geoaccel.merging.rates import Kind
from geoaccel.plan import MergePlan
from geoaccel.precision import own_precision
from geoaccel.similarity import UNIT_NUMBERS

OPERATIONS = 150
"""Additional small operations per attention compared with dense; measured on a CPU."""


@dataclass(frozen=True)
class Decision:
    """Whether a forward merges.

    Attributes:
        why: Why attention stays dense; None if tokens are merged.
        gain: Predicted speedup; None if there is nothing to merge.
    """

    why: str | None
    gain: float | None = None


@dataclass
class Matching:
    """State shared by the layers of one forward.

    Attributes:
        decision: Made before the first layer.
        partition: Roles of the tokens; None if none merge.
        plans: Merge plans, by the layer that computed them.
    """

    decision: Decision
    partition: Partition | None = None
    plans: dict[int, MergePlan] = field(default_factory=dict)


@dataclass(frozen=True)
class JointMerging(AttentionMerging):
    """Knobs of a method with one plan for all heads.

    Attributes:
        ratio: Fraction of all tokens to remove. Targets and protected tokens always stay, so that at most about two
            thirds can go; the effect says how many did. At lower ratios, the sources least similar to their target stay
            unmerged.
        protect: Fraction of the tokens that stay unmerged.
        anchor: Every token of the first frame is a target. pi3 has no reference frame and may not need it.
        log_bias: Weight a merged key by the number of tokens that it represents (proportional attention). Not part of
            the published methods. On the minis it keeps LiteVGGT's outputs closer to the dense model's, but cameras
            score lower.
        released_code: Choose tokens exactly as the published code does, for weights trained with it; see
            :mod:`geoaccel.merging.released`. Takes one scene at a time.
    """

    ratio: float = 0.9
    protect: float = 0.1
    anchor: bool = True
    log_bias: bool = False
    released_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, ratio=self.ratio, protect=self.protect)
        if self.released_code and not self.anchor:
            raise UserError(f"{self.name}: the released code does not support anchor=False; leave out one of the two")

    def mixer(self, kernel: str) -> JointMixer:
        return JointMixer(self, kernel)

    def partition(self, context: AttentionContext, layout: TokenLayout, device: torch.device) -> Partition:
        """Targets, protected tokens and sources of one forward, in 1 or B rows."""
        raise NotImplementedError

    def num_candidates(self, layout: TokenLayout) -> int:
        """Number of tokens of a scene that are not targets."""
        return (layout.frames - int(self.anchor)) * (layout.num_patches - num_cells(layout.grid))

    def num_sources(self, layout: TokenLayout) -> int:
        """Number of sources of a scene, neither target nor protected; approximate."""
        protected = int(self.protect * (layout.frames - int(self.anchor)) * layout.num_patches)
        return self.num_candidates(layout) - protected

    def preparation(self, layout: TokenLayout, width: int) -> Extra:
        """Work of computing the partition of one scene, at C = ``width``."""
        return Extra()


class JointMixer(MergingMixer):
    """Merges, attends, and copies back after the projection.

    Args:
        method: The method with its knobs.
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
        layer: Index of the layer.
        source: Index of the layer whose matching it uses: its own, or an earlier one.
        matchings: Number of layers that compute a matching.
        depth: Number of layers that share one partition.
    """

    method: JointMerging

    def __init__(
        self,
        method: JointMerging,
        kernel: str,
        *,
        layer: int = 0,
        source: int | None = None,
        matchings: int = 1,
        depth: int = 1,
    ) -> None:
        super().__init__(method, kernel)
        self.source = layer if source is None else source
        self.refresh = self.source == layer
        self.matchings = matchings
        self.depth = depth

    @torch.no_grad()
    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        """Partition the tokens, once for all layers of one forward."""
        layout, notes = context.layout, context.state.notes
        if layout is None or context.packing is not None or self.method in notes:
            return
        patches = context.state.patches
        dtype = torch.float32 if patches is None else patches.dtype
        decision = self.decide(layout, Kind(device, dtype, heads * head_dim, head_dim, self.kernel))
        matching = notes[self.method] = Matching(decision)
        if decision.why is None:
            with own_precision(device):
                matching.partition = self.method.partition(context, layout, device).expand(layout.batch)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = dense_layout(self.method, q, context)
        matching: Matching | None = context.state.notes.get(self.method)
        decision = self.decide(layout, self.kind(q)) if matching is None else matching.decision
        if decision.why is not None:
            return self.dense(q, k, v, x, context, decision.why, decision.gain)
        plan = self.plan(x, layout, context)
        q, k, v = (plan.merge(t.transpose(1, 2).flatten(2)).unflatten(-1, t.shape[1::2]) for t in (q, k, v))
        short = [t.transpose(1, 2) for t in (q, k, v)]
        if self.method.log_bias:
            scenes = zip(*(t.split(1) for t in short), plan.log_counts, strict=True)
            mixed = torch.cat([attend(*scene, key_bias=bias, kernel=self.kernel) for *scene, bias in scenes])
        else:
            mixed = attend(*short, kernel=self.kernel)
        self.effect = Effect(layout.tokens_per_scene, plan.num_groups, plan.num_groups, gain=decision.gain)
        return mixed, plan.unmerge

    def held(self, tokens: Tokens) -> Held:
        layout, x = tokens.layout, tokens.bytes
        sources = max(0, self.method.num_sources(layout))
        targets = layout.tokens_per_scene - self.method.num_candidates(layout)
        left = 1 - min(sources, int(self.method.ratio * layout.tokens_per_scene)) / layout.tokens_per_scene
        # Sources and targets, and both normalised; or queries with heads side by side, and all three merged.
        numbers = max(sources, targets) / layout.tokens_per_scene * x / tokens.element
        floats = 2 * 4 * numbers if numbers <= 2 * UNIT_NUMBERS else 3 * 4 * UNIT_NUMBERS  # in ``unit``
        matched = (2 * sources + targets) / layout.tokens_per_scene * x + floats
        return Held(max(matched, (1 + 3 * left) * x), left * x, restored=True, queries=left, keys=left)

    def decide(self, layout: TokenLayout, kind: Kind) -> Decision:
        """Whether the scenes of a layout merge."""
        method, tokens = self.method, layout.tokens_per_scene
        sources = method.num_sources(layout)
        merged = min(sources, int(method.ratio * tokens))
        if int(method.ratio * tokens) == 0:
            return Decision(f"ratio {method.ratio:g}")
        if layout.frames == 1:
            return Decision("one frame")
        if sources <= 0:
            return Decision("no token may be merged")
        # Each layer counts its share of the common work, so that all of them merge or none does.
        pairs = sources * (tokens - method.num_candidates(layout)) * self.matchings / self.depth
        extra = Extra(pairs=pairs, merged=tokens * kind.width, operations=OPERATIONS)
        extra += method.preparation(layout, kind.width).shared(self.depth)
        left = tokens - merged
        gain = attention_gain(Work(tokens, left, left, extra), layout, kind, self.setting)
        return Decision(method.too_little(gain), gain)

    @torch.no_grad()
    def plan(self, x: Tensor, layout: TokenLayout, context: AttentionContext) -> MergePlan:  # x [B, N, C]
        """The groups of this layer."""
        matching: Matching | None = context.state.notes.get(self.method)
        if matching is None or matching.partition is None:
            raise RuntimeError(
                f"{self.method.name} was not prepared before the first block: a mixer that wraps another must pass on "
                "Mixer.prepare"
            )
        # Keyed by layer: gradient checkpointing reruns layers after later ones have recomputed the matching.
        if self.refresh or self.source not in matching.plans:
            most = int(self.method.ratio * layout.tokens_per_scene)
            matching.plans[self.source] = matching.partition.assign(x, most)
        return matching.plans[self.source]


def dense_layout(method: AttentionMerging, q: Tensor, context: AttentionContext) -> TokenLayout:  # q [B, A, N, D]
    """The layout of the scenes of a global attention.

    Raises:
        ValueError: If its tokens are not those of whole dense scenes.
    """
    layout = context.layout
    if layout is None or context.lengths is not None or q.shape[2] != layout.tokens_per_scene:
        raise ValueError(f"{method.name} merges the dense tokens of whole scenes, in global attention only")
    return layout
