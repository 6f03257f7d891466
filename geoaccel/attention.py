"""The seam between backbones and methods: the context of an attention, and the two places where a method can act.

Every attention module of every backbone runs ``qkv -> norms -> RoPE -> mixer -> proj -> restore``. The :class:`Mixer`
is a plain object in the module's ``mixer`` attribute, never an ``nn.Module``, so no parameter moves and no state-dict
key changes. The dense mixer calls :func:`attend`; a merging method puts its own object there, shortens q, k and v,
calls :func:`attend` on what is left and says how to restore the full length. A :class:`Packer` in the encoder's slot
merges the token stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from geoaccel.attention_kernels import KeyRows, attend
from geoaccel.layout import AttentionKind, Packing, TokenLayout
from geoaccel.memory_plan import MemoryPlan

Restore = Callable[[Tensor], Tensor]


class Frames(Protocol):
    """Images produced a few frames at a time, with the part of the interface of a tensor [B, S, 3, H, W] methods use.

    Attributes:
        shape: [B, S, 3, H, W].
    """

    @property
    def shape(self) -> torch.Size: ...

    def flatten(self, start: int, end: int) -> Frames:
        """All frames of all scenes as one sequence."""
        ...

    def split(self, count: int) -> Iterator[Tensor]:  # [n, 3, H, W] each
        """Chunks of `count` frames."""
        ...


@dataclass
class ForwardState:
    """State of one forward besides its tokens; new for each forward.

    Images and patches are available until the first block of the aggregator; kept longer, they would add to the peak
    of memory.

    Attributes:
        images: [B, S, 3, H, W] as the network sees them (normalised); with a plan they are produced on demand.
        patches: [B, S, h * w, C], the encoder's output; None where tokens were packed.
        notes: State that methods keep between layers, each under its own knobs.
        plan: Memory plan; None: there is none.
        settle: Called before the residual stream is changed in place.
    """

    images: Tensor | Frames | None = None
    patches: Tensor | None = None
    notes: dict[Hashable, Any] = field(default_factory=dict)
    plan: MemoryPlan | None = None
    settle: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Free images and patches."""
        self.images = self.patches = None


@dataclass
class AttentionContext:
    """Context of one attention call besides its tokens.

    Attributes:
        kind: Which tokens attend to each other.
        index: Which block of that kind this is, from 0.
        layout: The dense layout: the encoder's with its own special tokens, the aggregator's everywhere else.
        rope: Rotary tables (cos, sin), each [L, 2, D / 4]. In sequences of more than L tokens, positions repeat with
            period L.
        lengths: Segment lengths where the sequence is packed; None where it is dense.
        log_weight: [T], the logarithm of the number of tokens in each packed row, added to the attention logits of that
            key; None where keys are not weighted.
        packing: The tokens of each packed row; None where the sequence is dense.
        state: That of the forward.
    """

    kind: AttentionKind
    index: int = 0
    layout: TokenLayout | None = None
    rope: tuple[Tensor, Tensor] | None = None
    lengths: tuple[int, ...] | None = None
    log_weight: Tensor | None = None
    packing: Packing | None = None
    state: ForwardState = field(default_factory=ForwardState)

    @property
    def key_rows(self) -> KeyRows | None:
        """The keys grouped by weight; shared by all attentions of a forward with the same weights."""
        if self.log_weight is None:
            return None
        key, notes = (KeyRows, self.log_weight, self.lengths), self.state.notes
        if key not in notes:
            notes[key] = KeyRows(self.log_weight, self.lengths)
        return notes[key]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one attention, for estimates of memory.

    Attributes:
        layout: The dense layout, B = 1.
        count: N of the attention; fewer where tokens are packed.
        width: C.
        heads: A.
        element: Bytes per number.
        cuda: Whether they are on a CUDA device.
        weighed: Whether keys are weighted by the tokens that they represent.
    """

    layout: TokenLayout
    count: float
    width: int
    heads: int
    element: int
    cuda: bool
    weighed: bool = False

    @property
    def bytes(self) -> float:
        """Size of one number for each channel of each token: the stream, or all queries."""
        return self.count * self.width * self.element

    @property
    def per_head(self) -> float:
        """Count of one number for each head of each token."""
        return self.count * self.heads


@dataclass(frozen=True)
class Held:
    """Memory of a mixer, in bytes.

    Attributes:
        inside: Peak in addition to its arguments, result included.
        mixed: Size of its result.
        copied: Whether the projection copies the result first, because its memory layout is head by head.
        restored: Whether the full length is restored after the projection.
        queries, keys: Number of queries and of keys per query, as fractions of the tokens.
    """

    inside: float
    mixed: float
    copied: bool = False
    restored: bool = False
    queries: float = 1.0
    keys: float = 1.0


class Mixer(Protocol):
    """Mixes values between the tokens of a sequence.

    Attributes:
        reads_tokens: Whether it reads the tokens themselves; otherwise it may get none, to save memory.
    """

    reads_tokens: ClassVar[bool] = True

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        """Look at images and patches before the first block of the aggregator; does nothing by default.

        A mixer that wraps another passes the call on.

        Args:
            heads: A of this attention.
            head_dim: D of this attention.
            device: Device of its tokens.
            context: Context of this attention without its sequence: kind, index, layout, packing and state.
        """
        return  # a concrete default: without a statement type checkers take the method for abstract

    def held(self, tokens: Tokens) -> Held:
        """Memory of a call; by default that of its result alone."""
        return Held(tokens.bytes, tokens.bytes)

    def reads_keys(self, x: Tensor, heads: int, context: AttentionContext) -> Tensor | None:  # x [n, N, C]
        """The tokens whose keys and values the next call will read, in order; by default all.

        If possible, the attention computes only these, and the call gets fewer keys than queries. It may also get all:
        on CUDA, with gradients or compilation, or if another mixer wraps this one.

        Returns:
            Token indices [H, M] on the CPU, for each head or (H = 1) for all heads; None: all tokens.
        """
        return None

    def __call__(
        self,
        q: Tensor,  # [n, A, N, D], normed and rotated; n = 1 where the sequence is packed
        k: Tensor,  # [n, A, N, D], or [n, A, M, D] of what it reads
        v: Tensor,  # like k
        x: Tensor,  # [n, N, C], the tokens that q, k and v were made from
        context: AttentionContext,
    ) -> tuple[Tensor, Restore | None]:  # [n, A, M, D]
        """Return mixed values, and what to apply to ``[n, M, C]`` after the output projection (None: nothing)."""
        ...


class Packer(Protocol):
    """Merges the token stream after one block of the encoder; everything after runs on fewer rows.

    For estimates of memory, a packer that knows how many rows it keeps has a method ``share(layout, device, dtype)``,
    packed rows per dense token, and ``weighed``, whether it weights keys.

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
        """Packed rows [T, C] and their packing; None leaves the tokens as they are.

        With x itself instead of rows the stream keeps its full length, and the members of a group share the update of
        every further block.
        """
        ...


@dataclass(frozen=True)
class DenseMixer(Mixer):
    """Every token attends to every token of its segment.

    Attributes:
        kernel: A name from ``KERNELS``.
    """

    reads_tokens: ClassVar[bool] = False
    kernel: str = "sdpa"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        mixed = attend(
            q,
            k,
            v,
            lengths=context.lengths,
            key_bias=context.log_weight,
            key_rows=context.key_rows,
            kernel=self.kernel,
        )
        return mixed, None

    def held(self, tokens: Tokens) -> Held:
        # One call per key weight: keys and values once more, and three outputs.
        return Held((5 if tokens.weighed and tokens.cuda else 1) * tokens.bytes, tokens.bytes)


DENSE = DenseMixer()


@dataclass(frozen=True)
class FrameOnly(Mixer):
    """Restricts a global attention to single frames: a control, not a method.

    In every global attention, it makes a backbone process each image separately. A measurement that does not notice
    this cannot judge a merging method.
    """

    reads_tokens: ClassVar[bool] = False
    kernel: str = "sdpa"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = context.layout
        if layout is None or context.lengths is not None or q.shape[2] != layout.tokens_per_scene:
            raise ValueError("frame-only attention needs the dense tokens of whole scenes")
        shape = (layout.frames, layout.tokens_per_frame)
        q, k, v = (t.unflatten(2, shape).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        mixed = attend(q, k, v, kernel=self.kernel)
        return mixed.unflatten(0, (-1, layout.frames)).transpose(1, 2).flatten(2, 3), None

    def held(self, tokens: Tokens) -> Held:
        return Held(2 * tokens.bytes, tokens.bytes, copied=True, keys=1 / tokens.layout.frames)
