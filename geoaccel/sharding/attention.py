"""Attention of one process's queries to the keys and values of all, replacing the mixers of global attention.

Dense attention is a ring (Liu et al., Ring Attention, arXiv 2310.01889): blocks of keys and values are passed around,
each is attended to while the next one is received, and outputs are combined by their log-sum-exp. If a method selects
keys by position, each process selects its own, and these are all-gathered. A method that compares the tokens of a
whole scene cannot be split like that and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, DenseMixer, FrameOnly, Held, Mixer, Restore, Tokens
from geoaccel.attention_kernels import attend, attend_groups
from geoaccel.errors import UserError
from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import AsymmetricMixer
from geoaccel.merging.frames import FrameLayer, FrameMixer
from geoaccel.merging.key_subset import KeySubset, pick
from geoaccel.merging.method import Effect, MergingMixer
from geoaccel.sharding.ranks import Ranks, on_device_of, spans

KERNELS = ("sdpa", "matmul")
"""Kernels of dense attention that return the log-sum-exp, with which blocks are combined."""


def over_ranks(mixer: Any, ranks: Ranks, layer: int) -> Mixer:
    """The mixer that replaces another one of a global attention.

    Raises:
        UserError: If its method needs all tokens of a scene in one process.
    """
    if isinstance(mixer, DenseMixer):
        return RingMixer(ranks, _known(mixer.kernel))
    if isinstance(mixer, AsymmetricMixer):
        return SubsetMixer(mixer, ranks)
    if isinstance(mixer, FrameOnly) or (
        isinstance(mixer, FrameMixer) and isinstance(mixer.method, FrameLayer) and not mixer.method.bypass
    ):
        return mixer  # attends within frames
    name = mixer.method.name if isinstance(mixer, MergingMixer) else repr(mixer)
    raise UserError(
        f"{name} (layer {layer}) needs all tokens of a scene in one process and cannot run on several; use "
        "merging='asymmetric', which chooses keys by position, frame-only layers, or none"
    )


def _known(kernel: str) -> str:
    if kernel not in KERNELS:
        raise UserError(f"attention={kernel!r} does not run on several processes; use one of {', '.join(KERNELS)}")
    return kernel


class RingMixer(Mixer):
    """Dense attention over all ranks.

    Args:
        ranks: The group, with the frames of each rank.
        kernel: ``sdpa`` or ``matmul``.
    """

    def __init__(self, ranks: Ranks, kernel: str) -> None:
        self.ranks, self.kernel = ranks, kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        _check(q, context)
        assert context.layout is not None
        return self.ring(q, k, v, context, context.layout.tokens_per_frame), None

    def held(self, tokens: Tokens) -> Held:
        # Keys and values of two ranks and one output; in float32 the output so far, the next part, and their sum.
        floats = 4 * tokens.count * tokens.width
        return Held(5 * tokens.bytes + 3 * floats, tokens.bytes)

    def ring(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, per_frame: int) -> Tensor:
        """Every query to the keys of all ranks, of so many tokens a frame."""
        lengths = [count * per_frame for count in self.ranks.forward.counts]
        blocks = self.ranks.around(torch.stack([k, v]), lengths, 3, (context.kind, context.index))
        out = total = None
        for keys, values in blocks:
            part, log_sum = with_log_sum(q, keys, values, self.kernel)
            if out is None or total is None:
                out, total = part.float(), log_sum.float()
                continue
            # Weight of this block among all keys so far; combined in float32, or rounding would grow with the ranks.
            out = torch.lerp(out, part.float(), torch.sigmoid(log_sum - total)[..., None])
            total = torch.logaddexp(total, log_sum)
        assert out is not None
        return out.to(q.dtype)

    def __repr__(self) -> str:
        return f"Ring(over {self.ranks.size} processes, kernel={self.kernel!r})"


class FramesMixer(Mixer):
    """Attention over one token per frame, over all ranks: that of a camera head.

    Tokens after those of the frames, such as the one that quantization adds, are the same on all ranks and stay local.
    """

    def __init__(self, ranks: Ranks, kernel: str) -> None:
        self.ranks, self.kernel = ranks, kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        _check_gradients(q)
        counts = self.ranks.forward.counts
        count = counts[self.ranks.rank]
        mine, more = torch.stack([k, v]).split([count, k.shape[2] - count], dim=3)
        parts = self.ranks.everybody(mine, counts, 3, (context.kind, context.index))
        keys, values = torch.cat([*parts, more], dim=3)
        return attend(q, keys, values, kernel=self.kernel), None

    def __repr__(self) -> str:
        return f"Frames(over {self.ranks.size} processes)"


class SubsetMixer(MergingMixer):
    """Asymmetric attention over all ranks: the keys of the whole scene, each rank selecting its own.

    Rank 0 decides whether it acts: rates of machines may differ.
    """

    method: Any

    def __init__(self, inner: AsymmetricMixer, ranks: Ranks) -> None:
        super().__init__(inner.method, inner.kernel)
        self.inner, self.ranks, self.setting = inner, ranks, inner.setting

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        _check(q, context)
        assert context.layout is not None
        forward = self.ranks.forward
        layout = forward.whole(context.layout)
        tokens = layout.tokens_per_scene
        if self.method not in forward.notes:
            forward.notes[self.method] = self.ranks.first_says(lambda: self._verdict(layout, q))
        why, gain = forward.notes[self.method]
        if why is not None:
            self.effect = Effect(tokens, tokens, tokens, why, gain)
            ring = RingMixer(self.ranks, _known(self.kernel))
            return ring.ring(q, k, v, context, layout.tokens_per_frame), None
        mixed, keys = self._attend(q, k, v, context, layout)
        self.effect = Effect(tokens, tokens, keys, gain=gain)
        return mixed, None

    def _verdict(self, layout: TokenLayout, q: Tensor) -> tuple[str | None, float | None]:
        """Why a single process would attend densely to the whole scene, if it would, and the predicted gain."""
        asked = q.new_empty(1).expand(q.shape[0], q.shape[1], layout.tokens_per_scene, q.shape[3])
        return self.method.verdict(self.inner.why_dense(layout), lambda: self.inner.predicted(layout, asked))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layout: TokenLayout
    ) -> tuple[Tensor, int]:
        forward = self.ranks.forward
        note = (self.method, self.inner.quarter)
        if note not in forward.notes:
            forward.notes[note] = Shares(self.inner.subset(layout, q.shape[1]), layout, forward.counts, self.ranks.rank)
        shares: Shares = forward.notes[note]
        own = on_device_of(q, shares.own)
        mine = torch.stack(pick(k, v, own))
        lengths = [sum(lengths) for lengths in shares.lengths]
        parts = self.ranks.everybody(mine, lengths, 3, (context.kind, context.index))
        # Keys of all ranks that represent only themselves, then the sampled ones: as in one process.
        halves = [part.split(pair, dim=3) for part, pair in zip(parts, shares.lengths, strict=True)]
        keys, values = torch.cat([*(half[0] for half in halves), *(half[1] for half in halves)], dim=3)
        whole, sampled = (sum(column) for column in zip(*shares.lengths, strict=True))
        bias = self.method.log_count(shares.patches_each, layout.frames)
        if bias == 0:
            return attend(q, keys, values, kernel=self.kernel), whole + sampled
        groups = ((whole, 0.0), (sampled, bias))
        return attend_groups(q, keys, values, groups, kernel=self.kernel), whole + sampled


class Shares:
    """Keys of a scene by rank.

    Attributes:
        own: [H, m], keys of this rank, as tokens of its own frames: those that represent only themselves, then the
            sampled ones.
        lengths: Numbers of both for each rank.
        patches_each: Number of patches that a sampled key represents.
    """

    def __init__(self, subset: KeySubset, layout: TokenLayout, counts: tuple[int, ...], rank: int) -> None:
        ends = [span.stop * layout.tokens_per_frame for span in spans(counts)]
        starts = [0, *ends[:-1]]
        groups = subset.index[:, : subset.whole], subset.index[:, subset.whole :]
        # All heads have equally many keys of a frame.
        borders = [torch.searchsorted(group[0].contiguous(), torch.tensor([0, *ends])).tolist() for group in groups]
        self.lengths = [tuple(border[r + 1] - border[r] for border in borders) for r in range(len(counts))]
        parts = [group[:, border[rank] : border[rank + 1]] for group, border in zip(groups, borders, strict=True)]
        self.own = torch.cat(parts, dim=1) - starts[rank]
        self.patches_each = subset.patches_each


def with_log_sum(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of each query's logits [n, A, N].

    Torch's flash attention returns it on a CPU and, in narrow dtypes, on CUDA; its memory-efficient one in float32.
    """
    aten = torch.ops.aten
    if kernel == "sdpa" and not q.is_cuda and q.dtype != torch.float16:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == "sdpa" and q.is_cuda and q.shape[-1] % 8 == 0:
        if q.dtype in (torch.bfloat16, torch.float16):
            return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        out, log_sum = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        return out, log_sum[..., : q.shape[2]]  # its rows are padded
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.softmax(dim=-1) @ v, logits.float().logsumexp(dim=-1)


def _check(q: Tensor, context: AttentionContext) -> None:
    """Refuse tokens that are not all of this rank's frames."""
    _check_gradients(q)
    layout = context.layout
    if layout is None or context.packing is not None or q.shape[2] != layout.tokens_per_scene:
        raise ValueError("attention over several processes needs the dense tokens of whole frames")


def _check_gradients(q: Tensor) -> None:
    if torch.is_grad_enabled() and q.requires_grad:
        raise UserError("a model over several processes has no gradients; call it under torch.inference_mode()")
