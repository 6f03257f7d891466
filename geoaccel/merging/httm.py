"""HTTM: Head-wise Temporal Token Merging (Wang et al., CVPR 2026, arXiv 2511.21317)."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, replace
from functools import partial
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, Held, Tokens
from geoaccel.errors import UserError
from geoaccel.knobs import whole_numbers
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.gain import Extra, Work
from geoaccel.merging.headwise import attend_ragged, match, split_outliers
from geoaccel.merging.method import AttentionMerging, check_share, register
from geoaccel.merging.scenes import SceneMixer
from geoaccel.merging.temporal import Places, Split, Splits, dense_splits, num_blocks
from geoaccel.plan import MergePlan
from geoaccel.registry import Registry

BLOCKS = Registry("block", {"spatial-first": (512, 4), "temporal-first": (128, 30)})
"""Presets of the block size: patches of a frame, and frames. The second is the paper's, for video; on both minis it
also keeps 0.02 more of AUC@30 at 64 unordered images."""

PUBLISHED = {"query_keep": 0.2, "key_keep": 0.3, "outliers": 0.1}
"""The paper's fractions, the defaults without ``ratio``."""

KEYS_PER_QUERY = 0.875
"""Keys removed per query removed, if only ``ratio`` is given; the paper's 0.7 / 0.8."""

OUTLIERS_PER_QUERY = 0.5
"""Most outliers per query that stays, if only ``ratio`` is given; the paper's 0.1 / 0.2."""

OPERATIONS = 400
"""Additional small operations per attention compared with dense; measured on a CPU."""


@register
@dataclass(frozen=True)
class HTTM(AttentionMerging):
    """Merges queries and keys separately in every head, inside blocks of nearby frames, in every global attention.

    The same patches of a few consecutive frames form a block. In each block a tenth of the patches, evenly spread, are
    targets, and each head merges every other patch into the target with the most similar query. The queries farthest
    from their group's mean (outliers) are taken out again, with one budget shared by all heads. Keys merge in the same
    way, without that filter, and values follow them. Attention sees 20 % of the queries and 30 % of the keys; every
    query then gets the output of its group. Needs no training.

    Differs from the paper in:
        - The patches of the first frame are targets in addition to the others. This is the paper's own option against
          drift (its starred HTTM); it is the default here because VGGT expresses all cameras relative to that frame.
          The paper's tables do not mention it and most likely do not use it: ``anchor=False``, with which vggt-mini
          loses 0.09 of AUC@30 at 64 frames of rendered scenes. pi3, which the paper does not cover, has no reference
          frame and may not need it.
        - Camera and register tokens are never merged; fractions refer to patches.
        - Blocks are of nearly equal size, so that none is short.
        - All patches of a block that are not targets merge. The paper's targets are not published; ours are spread
          evenly over the image, at different places in every frame.
        - The query nearest to its group's mean always stays, so that no group becomes empty and the number of queries
          is exact. Of equally distant queries the first is the outlier.
        - A single frame, or so few tokens that merging would gain too little, is left dense (``bypass=False``: only a
          single frame is).

    As in the paper: matching is by cosine similarity after norms and rotary embedding, repeated in every layer; means
    count every token once; the filter runs once, and distances are not recomputed; keys are not weighted by the number
    of tokens that they represent.

    On tokens that another method has packed, means are weighted by the number of tokens that a row represents, and a
    merged key weighs as much as its rows do on average (with ``log_bias``: in total).

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=HTTM(query_keep=0.3))

    Attributes:
        ratio: Replaces the next two: the fraction of queries to remove; 0.8 gives their defaults.
        query_keep: Fraction of the queries that stay, outliers included; 0.2 by default.
        key_keep: Fraction of the keys that stay; 0.3 by default.
        outliers: Fraction of the queries that are taken out of their groups; 0.1 by default, less if ``ratio`` leaves
            few.
        block: Size of a block: patches of a frame, and frames; or a name from ``BLOCKS``.
        adaptive: One outlier budget shared by all heads; False: every head has the same number.
        anchor: The patches of the first frame are all targets.
        log_bias: Weight a merged key by the number of tokens that it represents (proportional attention). Not part of
            HTTM.
    """

    name: ClassVar[str] = "httm"
    takes_packed: ClassVar[bool] = True
    ratio: InitVar[float | None] = None
    # None: not given; replaced by numbers in __post_init__.
    query_keep: float = None  # type: ignore[assignment]
    key_keep: float = None  # type: ignore[assignment]
    outliers: float = None  # type: ignore[assignment]
    block: str | tuple[int, int] = "temporal-first"
    adaptive: bool = True
    anchor: bool = True
    log_bias: bool = False

    def __post_init__(self, ratio: float | None) -> None:
        super().__post_init__()
        defaults = dict(PUBLISHED)
        if ratio is not None:
            check_share(self, ratio=ratio)
            for knob in ("query_keep", "key_keep"):
                if getattr(self, knob) is not None:
                    raise UserError(
                        f"httm: ratio={ratio} and {knob}={getattr(self, knob)} both set how many tokens stay; "
                        "leave one out"
                    )
            keep = round(1 - ratio, 12)  # 1 - 0.8 is not 0.2
            keys, outliers = round(1 - KEYS_PER_QUERY * ratio, 12), OUTLIERS_PER_QUERY * keep
            defaults = {"query_keep": keep, "key_keep": keys, "outliers": min(defaults["outliers"], outliers)}
        for knob, value in defaults.items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, value)
        for knob in ("query_keep", "key_keep"):
            value = getattr(self, knob)
            if not isinstance(value, Real) or not 0 < float(value) <= 1:
                raise UserError(f"httm: {knob}={value!r} is not in (0, 1]; 1 merges nothing")
        check_share(self, outliers=self.outliers)
        if self.outliers >= self.query_keep:
            raise UserError(
                f"httm: outliers={self.outliers} leaves no targets within query_keep={self.query_keep}; reduce it"
            )
        if not isinstance(self.block, str):
            block = whole_numbers(self.block)
            if block is None or len(block) != 2 or min(block) < 1:
                raise UserError(
                    f"httm: block={self.block} must be (patches, frames), both at least 1, or one of "
                    f"{', '.join(sorted(BLOCKS))}"
                )
            object.__setattr__(self, "block", block)
        self.block_size  # noqa: B018  (an unknown name is an error)

    @property
    def block_size(self) -> tuple[int, int]:
        """Size of a block: patches of a frame, and frames."""
        return BLOCKS[self.block] if isinstance(self.block, str) else self.block

    def mixer(self, kernel: str) -> HTTMMixer:
        return HTTMMixer(self, kernel)


class HTTMMixer(SceneMixer):
    """Merges each head's queries, keys and values, attends, and copies back before the projection."""

    method: HTTM
    refusal = partial(ValueError, "httm merges the tokens of whole scenes, dense or packed, in global attention only")

    def why_dense(self, layout: TokenLayout) -> str | None:
        nothing = self.method.query_keep == self.method.key_keep == 1
        return "ratio 0" if nothing else "one frame" if layout.frames == 1 else None

    def mix_scenes(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layout: TokenLayout, packing: Packing | None
    ) -> tuple[Tensor, float, float]:
        splits = self.splits(layout, packing, context, q.device)
        if packing is None:
            return self.mix(q, k, v, splits[0])
        rows = packing.scene_lengths
        scenes = zip(*(t.split(rows, dim=2) for t in (q, k, v)), splits, packing.weight.split(rows), strict=True)
        found = [self.mix(*scene, weigh_keys=packing.weigh_keys) for scene in scenes]
        lengths = (sum(queries for _, queries, _ in found), sum(keys for *_, keys in found))
        return torch.cat([mixed for mixed, *_ in found], dim=2), *lengths

    def work(self, layout: TokenLayout, q: Tensor) -> Work:  # q [n, A, N, D]
        """Work of one attention; depends only on the shape of the queries."""
        method = self.method
        tokens = q.shape[2] * len(q) / layout.batch  # of one scene; of packed ones on average
        patches = tokens - layout.frames * layout.num_special
        anchors = patches / layout.frames if method.anchor else 0.0

        def left(keep: float) -> float:
            return tokens - (1 - keep) * (patches - anchors)

        queries, keys = left(method.query_keep), left(method.key_keep)
        runs, groups = num_blocks(layout, *method.block_size)
        # Blocks are batched, padded to the targets of the first ones, which hold the anchors, and the sources of the
        # last.
        block, first = patches / (runs * groups), anchors / runs
        free = block if groups > 1 else block - first
        pairs = 0.0
        for share in (method.query_keep - method.outliers, method.key_keep):
            pairs += runs * groups * (first + (block - first) * share) * free * (1 - share)
        extra = Extra(
            head_pairs=pairs * q.shape[1], merged_heads=tokens * q.shape[1] * q.shape[3], operations=OPERATIONS
        )
        return Work(tokens, queries, keys, extra)

    def splits(
        self, layout: TokenLayout, packing: Packing | None, context: AttentionContext, device: torch.device
    ) -> list[Splits]:
        """Targets and sources of queries and keys, for each packed scene, or once for all dense ones.

        The same in all layers of one forward.
        """
        notes, key = context.state.notes, (self.method, device)
        if key not in notes:
            method = self.method
            queries, keys = (
                None if keep == 1 else share
                for keep, share in (
                    (method.query_keep, method.query_keep - method.outliers),
                    (method.key_keep, method.key_keep),
                )
            )
            block, anchor = method.block_size, method.anchor
            if packing is None:
                notes[key] = [dense_splits(replace(layout, batch=1), block, (queries, keys), anchor, device)]
            else:
                notes[key] = [
                    tuple(None if s is None else Split.of(p, block, s, anchor=anchor) for s in (queries, keys))
                    for p in Places.packed(packing, layout)
                ]
        return notes[key]

    def held(self, tokens: Tokens) -> Held:
        method, x = self.method, tokens.bytes
        fixed = tokens.layout.frames * tokens.layout.num_special / tokens.count
        whole = int(method.anchor) / tokens.layout.frames  # fraction of the patches in the first frame
        shares = (keep + (1 - keep) * whole for keep in (method.query_keep, method.key_keep))
        queries, keys = (fixed + (1 - fixed) * share for share in shares)
        # Merged keys and values; the group of each token in each head, in int64, in a few forms; and at the end merged
        # queries, their output, and that for every token. Before, queries or values with heads side by side.
        aside = 0.0 if tokens.cuda else 2 * x
        inside = (2 * keys + 2 * queries + 1) * x + aside + 6 * 8 * tokens.per_head
        return Held(inside, x, copied=True, queries=queries, keys=keys)

    def mix(
        self,
        q: Tensor,  # [B, A, N, D]
        k: Tensor,  # [B, A, N, D]
        v: Tensor,  # [B, A, N, D]
        splits: Splits,
        weight: Tensor | None = None,  # [N]
        *,
        weigh_keys: bool = False,
    ) -> tuple[Tensor, float, float]:  # [B, A, N, D]
        """Attention of merged queries to merged keys, and the mean number of both.

        Args:
            q, k, v: Those of scenes with the same token layout.
            splits: Splits of queries and keys; None leaves them unmerged.
            weight: Number of tokens that each row represents; None: one.
            weigh_keys: Whether rows count as that many keys even if none merge.
        """
        for_queries, for_keys = splits
        weights = None if weight is None else weight.expand(q.shape[:-1])
        keys = None
        if for_keys is not None:
            k = k.contiguous()
            keys = match(k, for_keys)
            k, v = keys.merge(k, weights), keys.merge(v, weights)
        bias = self.key_bias(keys, weights if weigh_keys else None)
        if for_queries is None:
            mixed = attend_ragged(q, k, v, [q.shape[2]] * q.shape[0] * q.shape[1], bias, self.kernel)
            return mixed, q.shape[2], k.shape[2]
        q = q.contiguous()
        queries = match(q, for_queries)
        short = queries.merge(q, weights)
        lengths = [queries.num_groups] * q.shape[0] * q.shape[1]
        if self.method.outliers:
            wanted = for_queries.fixed * q.shape[1] + round(self.method.query_keep * q.shape[1] * for_queries.free)
            count = wanted - for_queries.num_groups * q.shape[1]
            queries, lengths = split_outliers(q, queries, short, count, shared=self.method.adaptive)
            short = queries.merge(q, weights)
        mixed = queries.unmerge(attend_ragged(short, k, v, lengths, bias, self.kernel))
        return mixed, sum(lengths) / len(lengths), k.shape[2]

    def key_bias(
        self,
        keys: MergePlan | None,
        weights: Tensor | None,  # [B, A, N]
    ) -> Tensor | None:  # [B, A, K], float32
        """The bias on the logits of the keys."""
        if weights is None:
            return keys.log_counts if keys is not None and self.method.log_bias else None
        if keys is None:
            return weights.float().log()
        total = keys.merge_weights(weights)
        return (total if self.method.log_bias else total / keys.counts).log()
