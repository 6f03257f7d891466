"""The seam between backbones and methods: what an attention is told, and the two places where a method can act.

Every attention module of every backbone runs ``qkv -> norms -> RoPE -> mixer -> proj -> restore``. The :class:`Mixer`
is a plain object in the module's ``mixer`` attribute, never an ``nn.Module``, so no parameter moves and no state-dict
key changes. The dense mixer calls :func:`attend`; a merging method puts its own object there, shortens q, k and v,
calls :func:`attend` on what is left and says how to restore the full length. A :class:`Packer` in the encoder's slot
merges the token stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import MissingPackage, UserError
from geoaccel.kernels.fp8 import fp8
from geoaccel.layout import AttentionKind, Packing, TokenLayout
from geoaccel.registry import Registry

Restore = Callable[[Tensor], Tensor]


@dataclass
class ForwardState:
    """What one forward knows besides its tokens; made afresh for each forward.

    Images and patches are there until the first block of the aggregator: they would otherwise live as long as the last
    one, where memory is scarcest.

    Attributes:
        images: [B, S, 3, H, W] as the network sees them (normalised).
        patches: [B, S, h * w, C], the encoder's output; None where tokens were packed.
        notes: What methods keep between the layers, each under its own knobs.
    """

    images: Tensor | None = None
    patches: Tensor | None = None
    notes: dict[Hashable, Any] = field(default_factory=dict)

    def release(self) -> None:
        """Let go of images and patches."""
        self.images = self.patches = None


@dataclass
class AttentionContext:
    """What one attention call knows besides its tokens.

    Attributes:
        kind: Whose tokens see each other.
        index: Which block of that kind this is, from 0.
        layout: The dense layout: the encoder's with its own special tokens, the aggregator's everywhere else.
        rope: Rotary tables (cos, sin), each [L, 2, D / 4], for the L tokens of the sequence.
        lengths: Segment lengths where the sequence is packed; None where it is dense.
        log_weight: [T], the logarithm of how many tokens each packed row stands for, added to the attention logits of
            that key; None where keys are not weighed.
        packing: What the packed rows stand for; None where the sequence is dense.
        state: Of the forward.
    """

    kind: AttentionKind
    index: int = 0
    layout: TokenLayout | None = None
    rope: tuple[Tensor, Tensor] | None = None
    lengths: tuple[int, ...] | None = None
    log_weight: Tensor | None = None
    packing: Packing | None = None
    state: ForwardState = field(default_factory=ForwardState)


class Mixer(Protocol):
    """Mixes values between the tokens of a sequence."""

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        """Look at images and patches before the first block of the aggregator; a mixer that inherits this does not.

        A mixer that stands for another passes it on.

        Args:
            heads: A of this attention.
            head_dim: D of it.
            device: Where its tokens are.
            context: Of this attention, without its sequence: kind, index, layout, packing and state.
        """

    def __call__(
        self,
        q: Tensor,  # [n, A, N, D], normed and rotated; n = 1 where the sequence is packed
        k: Tensor,  # [n, A, N, D]
        v: Tensor,  # [n, A, N, D]
        x: Tensor,  # [n, N, C], the tokens that q, k and v were made from
        context: AttentionContext,
    ) -> tuple[Tensor, Restore | None]:  # [n, A, M, D]
        """Return mixed values, and what to apply to ``[n, M, C]`` after the output projection (None: nothing)."""
        ...


class Packer(Protocol):
    """Merges the token stream behind one block of the encoder; everything after runs on fewer rows.

    Attributes:
        layer: Index of that block.
    """

    @property
    def layer(self) -> int: ...

    def __call__(
        self,
        x: Tensor,  # [B, S, P, C]
        layout: TokenLayout,
        state: ForwardState,
    ) -> tuple[Tensor, Packing] | None:
        """Packed rows [T, C] and what they stand for; None leaves the tokens as they are.

        With x itself instead of rows the stream keeps its full length, and the members of a group share what every
        further block adds to them.
        """
        ...


JOINED_FROM, JOINED_CALLS = 4096, 6
"""On CUDA :func:`joined` is used for at least so many keys with at most so many different weights."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's fused kernels, which store nothing quadratic."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The plain formula, with the attention matrix in memory.

    The reference implementation of every other kernel. For training on a CPU with short sequences it is the faster one:
    there the fused kernel's backward pass is slow, a step of vggt-mini on 24 frames of 112 pixels took 0.21 s instead
    of 0.36 s.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaling the queries passes over no N x M matrix
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def joined(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    key_bias: Tensor,  # [M], with few different values
) -> Tensor:  # [n, A, N, D]
    """Attention with a bias on keys through a kernel that takes none.

    The keys of each value b are attended to apart from the others, which gives an output O_b and the log-sum of its
    exponentials L_b. The softmax over all keys is the mean of the outputs, weighted by exp(L_b + b).

    Raises:
        ValueError: Where gradients are wanted; it has none.
    """
    if _learns(q, k, v):
        raise UserError("the log-sum of torch's flash attention has no gradient; attend with a bias instead")
    values = key_bias.unique().unbind()
    rows = [(key_bias == value).nonzero()[:, 0] for value in values]
    return _joined(q, [k.index_select(2, r) for r in rows], [v.index_select(2, r) for r in rows], values)


def _joined(
    q: Tensor,  # [n, A, N, D]
    keys: Sequence[Tensor],  # [n, A, M_i, D] each
    values: Sequence[Tensor],  # [n, A, M_i, D] each
    biases: Sequence[Tensor | float],  # one number each
) -> Tensor:  # [n, A, N, D]
    """Attention to groups of keys one after the other, as in :func:`joined`."""
    out, total = None, None
    for k, v, bias in zip(keys, values, biases, strict=True):
        part, log_sum = _with_log_sum(q, k, v)
        log_sum = log_sum + bias
        if out is None or total is None:
            out, total = part, log_sum
            continue
        # The share of this group among all keys so far.
        share = torch.sigmoid(log_sum - total).to(q.dtype)[..., None]
        out, total = torch.lerp(out, part, share), torch.logaddexp(total, log_sum)
    assert out is not None
    return out


def _with_log_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention, and the log-sum of the exponentials of each query [n, A, N]."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention, where the package is installed and has kernels for the device.

    Raises:
        MissingPackage: If it is not installed.
        NotImplementedError: If it has no kernel for these tensors, as on a CPU.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise MissingPackage(f"attention='xformers' needs xformers ({error}); pip install 'geoaccel[cuda]'") from None
    mask = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    out = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask)
    return out.transpose(1, 2)


KERNELS: Registry[Kernel] = Registry(
    "attention kernel", {"sdpa": sdpa, "matmul": matmul, "xformers": xformers, "fp8": fp8}
)


@dataclass(frozen=True)
class DenseMixer(Mixer):
    """Every token sees every token of its segment.

    Attributes:
        kernel: A name from ``KERNELS``.
    """

    kernel: str = "sdpa"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        mixed = attend(q, k, v, lengths=context.lengths, key_bias=context.log_weight, kernel=self.kernel)
        return mixed, None


DENSE = DenseMixer()


@dataclass(frozen=True)
class FrameOnly(Mixer):
    """Lets a global attention see one frame at a time: a control, not a method.

    With it in every global attention a backbone solves each image alone. A measurement that does not notice this cannot
    judge a merging method.
    """

    kernel: str = "sdpa"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = context.layout
        if layout is None or context.lengths is not None or q.shape[2] != layout.tokens_per_scene:
            raise UserError("frame-only attention needs the dense tokens of whole scenes")
        shape = (layout.frames, layout.tokens_per_frame)
        q, k, v = (t.unflatten(2, shape).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        mixed = attend(q, k, v, kernel=self.kernel)
        return mixed.unflatten(0, (-1, layout.frames)).transpose(1, 2).flatten(2, 3), None


def attend(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    *,
    lengths: tuple[int, ...] | None = None,
    key_bias: Tensor | None = None,  # [M]
    kernel: str = "sdpa",
) -> Tensor:  # [n, A, N, D]
    """Scaled dot-product attention.

    A bias that is the same for all queries reaches the kernel as a view without rows of its own, so that nothing of
    N x M is ever stored. On a CPU torch's fused kernel takes it at the speed of no bias; on CUDA its fastest kernel
    takes none, and long sequences go through :func:`joined`.

    Args:
        q, k, v: Queries, keys and values; logits are scaled by D^-1/2.
        lengths: Lengths of consecutive segments that do not see each other; then n = 1 and N = M = their sum.
        key_bias: Added to the logits of each key, for keys that stand for several tokens.
        kernel: A name from ``KERNELS``.
    """
    run = KERNELS[kernel]
    bias = None if key_bias is None else key_bias.to(q.dtype)
    if lengths is None or len(lengths) == 1:
        return _one_segment(run, q, k, v, bias)
    if q.shape[0] != 1 or q.shape[2] != sum(lengths) or k.shape[2] != sum(lengths):
        raise UserError(
            f"segments of {sum(lengths)} tokens need one sequence of that length, "
            f"got q {list(q.shape)} and k {list(k.shape)}"
        )
    if len(set(lengths)) == 1:  # equal segments are a batch
        fold = (len(lengths), lengths[0])
        q, k, v = (t[0].unflatten(1, fold).transpose(0, 1) for t in (q, k, v))
        mask = None if bias is None else _for_all_queries(bias.view(fold), lengths[0])
        return run(q, k, v, mask).transpose(0, 1).flatten(1, 2)[None]
    biases = (None,) * len(lengths) if bias is None else bias.split(lengths)
    segments = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), biases, strict=True)
    return torch.cat([_one_segment(run, *segment) for segment in segments], dim=2)


def attend_groups(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    groups: Sequence[tuple[int, float]],
    *,
    kernel: str = "sdpa",
) -> Tensor:  # [n, A, N, D]
    """Scaled dot-product attention to keys in consecutive groups, each with a weight of its own.

    On CUDA each group is a call of flash attention, and the outputs are joined by their log-sums; elsewhere the weights
    are a bias. Nothing waits for the device: the lengths of the groups are known to the caller.

    Args:
        q, k, v: Queries, keys and values; logits are scaled by D^-1/2.
        groups: The number of keys of each group, which sum to M, and what is added to their logits.
        kernel: A name from ``KERNELS``.
    """
    groups = [(count, value) for count, value in groups if count]
    if _flash_takes(KERNELS[kernel], q, k, v) and k.shape[2] >= JOINED_FROM:
        counts = [count for count, _ in groups]
        return _joined(q, k.split(counts, dim=2), v.split(counts, dim=2), [value for _, value in groups])
    bias = torch.cat([q.new_full((count,), value) for count, value in groups])
    return attend(q, k, v, key_bias=bias, kernel=kernel)


def _one_segment(run: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of every token to every token; bias [M]."""
    if bias is None:
        return run(q, k, v, None)
    if _flash_takes(run, q, k, v) and k.shape[2] >= JOINED_FROM and len(bias.unique()) <= JOINED_CALLS:
        return joined(q, k, v, bias)
    return run(q, k, v, _for_all_queries(bias[None], q.shape[2]))


def _flash_takes(run: Kernel, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's flash attention of CUDA, which tells its log-sums, can stand for a kernel."""
    narrow = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    return run is sdpa and q.is_cuda and narrow and not _learns(q, k, v)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _for_all_queries(
    bias: Tensor,  # [n, M]
    queries: int,
) -> Tensor:  # [n, 1, N, M], a view
    """The same bias on every row."""
    # CUDA's kernel wants rows that start at multiples of 8 entries; what does not it copies, to full size.
    aligned = F.pad(bias, (0, -bias.shape[1] % 8))
    return aligned[:, None, None, : bias.shape[1]].expand(-1, -1, queries, -1)
