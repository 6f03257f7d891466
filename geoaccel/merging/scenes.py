"""Base class of mixers that merge the tokens of whole scenes in global attention, dense or packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from geoaccel.attention import AttentionContext, Restore
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.gain import Work
from geoaccel.merging.method import Effect, MergingMixer


class SceneMixer(MergingMixer):
    """Attends densely if there is a reason to, otherwise mixes scene by scene; restores nothing.

    Attributes:
        refusal: The error for tokens that are not those of whole scenes.
    """

    reads_tokens = False
    refusal: ClassVar[Callable[[], ValueError]]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout, packing = self.scenes(q, context)
        why, gain = self.method.verdict(self.why_dense(layout), lambda: self.predicted(layout, q))
        if why is not None and k.shape[2] == q.shape[2]:  # not possible if some keys were not computed
            return self.dense(q, k, v, x, context, why, gain)
        mixed, queries, keys = self.mix_scenes(q, k, v, context, layout, packing)
        self.effect = Effect(q.shape[2], queries, keys, gain=gain)
        return mixed, None

    def scenes(self, q: Tensor, context: AttentionContext) -> tuple[TokenLayout, Packing | None]:
        """Layout and packing of the tokens of a global attention.

        Raises:
            ValueError: ``refusal``, for anything but whole scenes.
        """
        layout, packing = context.layout, context.packing
        if layout is not None and context.kind == "global":
            whole = layout.tokens_per_scene if packing is None else sum(packing.frame_lengths)
            if q.shape[2] == whole and (packing is None) == (context.lengths is None):
                return layout, packing
        raise type(self).refusal()

    def why_dense(self, layout: TokenLayout) -> str | None:
        """A reason to merge nothing that needs no prediction; None: there is none."""
        raise NotImplementedError

    def predicted(self, layout: TokenLayout, q: Tensor) -> float:  # q [n, A, N, D]
        """Predicted speedup."""
        return self.gain(self.work(layout, q), layout, q)

    def work(self, layout: TokenLayout, q: Tensor) -> Work:  # q [n, A, N, D]
        """Work of one attention; depends only on the shape of the queries."""
        raise NotImplementedError

    def mix_scenes(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layout: TokenLayout, packing: Packing | None
    ) -> tuple[Tensor, float, float]:
        """Mixed values, and the numbers of queries and keys left, summed over scenes if rows are packed."""
        raise NotImplementedError
