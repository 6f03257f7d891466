"""The tokens between the blocks of encoder and aggregator, dense or merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, ForwardState, Packer
from geoaccel.layout import AttentionKind, Packing, TokenLayout
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.in_parts import block_in_parts, each_in_parts
from geoaccel.models.layers.kept_layers import HostCopies, KeptLayer
from geoaccel.models.layers.rope import Rope, frame_tables, rope_tables


@dataclass
class TokenStream:
    """The tokens between two blocks.

    Attributes:
        x: [B, S, P, C], or [T, C] if packed.
        layout: The dense layout.
        rope: Rotary tables of one dense frame, or of all packed rows; None in the encoder.
        global_rope: Rotary tables of global attention, if different.
        packing: Which tokens are merged while attention and MLPs run; None if none are.
        state: State of the forward.
    """

    x: Tensor
    layout: TokenLayout
    rope: Rope | None = None
    global_rope: Rope | None = None
    packing: Packing | None = None
    state: ForwardState = field(default_factory=ForwardState)

    def dense(self) -> Tensor:  # [B, S, P, C]
        return self.packing.unpack(self.x) if self._packed else self.x  # type: ignore[union-attr]

    @property
    def step(self) -> int | None:
        """Tokens at a time, in whole frames; None: all of them."""
        plan, per_frame = self.state.plan, self.layout.tokens_per_frame
        return None if plan is None else plan.frames_in_blocks(per_frame) * per_frame

    def through(self, block: Block, kind: AttentionKind, index: int) -> TokenStream:
        """The stream after one more block; with a plan, updated in place."""
        packing, rope = self.packing, self.rope
        if kind == "global" and self.global_rope is not None:
            rope = self.global_rope
        if packing is not None:
            context = AttentionContext(
                kind, index, self.layout, rope, packing.lengths(kind), packing.log_weight, packing, self.state
            )
            if not self._packed:
                return replace(self, x=self._shared(block, context, packing))
            return self._run(block, self.x, context)
        batch, frames, per_frame, _ = self.x.shape
        if kind == "global":
            rows = self.x.reshape(batch, frames * per_frame, -1)
        else:
            rows = self.x.reshape(batch * frames, per_frame, -1)
        return self._run(block, rows, AttentionContext(kind, index, self.layout, rope, state=self.state))

    def _run(self, block: Block, rows: Tensor, context: AttentionContext) -> TokenStream:
        if self.step is None:
            return replace(self, x=block(rows, context).reshape(self.x.shape))
        block_in_parts(block, rows, context, self.step)
        return self

    def packed_by(self, packer: Packer) -> TokenStream:
        """The stream after a packer."""
        merged = packer(self.x, self.layout, self.state)
        return self if merged is None else replace(self, x=merged[0], packing=merged[1])

    def special(self) -> Tensor:  # [B, S, n, C]
        """The special tokens, which are never merged."""
        count = self.layout.num_special
        return self.x[self.packing.owner[:, :, :count]] if self._packed else self.x[:, :, :count]  # type: ignore[union-attr]

    def rows(self) -> Tensor:  # [T, C]
        """The tokens as attention and MLPs see them: packed rows, or all in order."""
        shared = self.packing is not None and not self._packed
        return self.packing.pack(self.x) if shared else self.x.reshape(-1, self.x.shape[-1])  # type: ignore[union-attr]

    def plus_rows(
        self,
        added: Tensor,  # [T, C], as `rows`
    ) -> TokenStream:
        """The stream with something added to every row."""
        shared = self.packing is not None and not self._packed
        return replace(self, x=self.x + (self.packing.unpack(added) if shared else added.view(self.x.shape)))  # type: ignore[union-attr]

    def plus_patches(
        self,
        added: Tensor,  # [B, S, h * w, C]
    ) -> TokenStream:
        """The stream with something added to every patch; a packed row gets the mean over its merged tokens."""
        special = added.new_zeros(*added.shape[:2], self.layout.num_special, added.shape[-1])
        added = torch.cat([special, added], dim=2).to(self.x.dtype)
        return replace(self, x=self.x + (self.packing.pack(added) if self._packed else added))  # type: ignore[union-attr]

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenStream:
        """Apply a token-wise function; with a plan, in place."""
        return replace(self, x=change(self.x) if self.step is None else each_in_parts(self.x, change, self.step))

    def enter(
        self,
        special: Tensor,  # [B, S, n, C]
        head_dim: int,
        rope_base: float,
        *,
        flat_global: bool = False,
    ) -> TokenStream:
        """Enter the trunk: other special tokens before every frame, and rotary tables.

        With ``flat_global``, positions in global attention only distinguish patches from special tokens: all patches
        are at (1, 1).
        """
        now, wanted = self.layout.num_special, special.shape[2]
        layout = replace(self.layout, num_special=wanted)
        packing = None if self.packing is None else self.packing.with_special(now, wanted)
        if self._packed:
            frames = self.x.split(self.packing.frame_lengths)  # type: ignore[union-attr]
            pairs = zip(special.flatten(0, 1), frames, strict=True)
            x = torch.cat([part for front, rows in pairs for part in (front, rows[now:])])
        else:
            x = torch.cat([special, self.x[:, :, now:]], dim=2)
        flat: Rope | None = None
        if packing is None:
            frame = (layout.grid, wanted, head_dim, rope_base, x.dtype, x.device)
            rope = frame_tables(*frame)
            flat = frame_tables(*frame, flat=True) if flat_global else None
        else:
            rope = rope_tables(packing.positions, head_dim, rope_base, x.dtype)
            if flat_global:
                flat = rope_tables(packing.positions.clamp(max=1), head_dim, rope_base, x.dtype)
        return TokenStream(x, layout, rope, flat, packing, self.state)

    @property
    def _packed(self) -> bool:
        return self.x.ndim == 2

    def _shared(self, block: Block, context: AttentionContext, packing: Packing) -> Tensor:
        """Run a block whose attention and MLP see the packed rows, while x keeps its full length."""
        x = self.x + packing.unpack(block.ls1(block.attn(packing.pack(block.norm1(self.x)), context)))
        return x + packing.unpack(block.ls2(block.mlp(packing.pack(block.norm2(x)))))


def alternate(
    stream: TokenStream,
    blocks: Iterable[tuple[AttentionKind, Block]],
    behind: Callable[[int, TokenStream], TokenStream] = lambda _, stream: stream,
) -> Iterator[TokenStream]:
    """Run the blocks in order and yield the stream after each.

    The blocks' mixers first see what the encoder left in the stream's state, which is then released.

    Args:
        stream: Input of the first block.
        blocks: Blocks and their kinds.
        behind: Applied to the stream after each block, given its index.
    """
    count: Counter[AttentionKind] = Counter()
    steps: list[tuple[AttentionKind, int, Block]] = []
    for kind, block in blocks:
        steps.append((kind, count[kind], block))
        count[kind] += 1
    for kind, index, block in steps:
        context = AttentionContext(kind, index, stream.layout, packing=stream.packing, state=stream.state)
        block.attn.mixer.prepare(block.attn.num_heads, block.attn.head_dim, stream.x.device, context)
    stream.state.release()
    for number, (kind, index, block) in enumerate(steps):
        stream = behind(number, stream.through(block, kind, index))
        yield stream


def last_two(steps: Iterable[TokenStream], count: int) -> Tensor | KeptLayer:  # [B, S, P, 2 * C]
    """The dense tokens after the last two of ``count`` steps, concatenated; no earlier step is kept."""
    tokens: list[Tensor] = []
    layers = Layers()
    for index, step in enumerate(steps):
        if index < count - 2:
            continue
        if step.step is None:
            tokens.append(step.dense())
        else:
            layers.add(0, step, last=index == count - 1)
    return torch.cat(tokens, dim=-1) if tokens else layers.done()[0]


class Layers:
    """The layers that heads read, copied from a stream that is changed in place."""

    def __init__(self) -> None:
        self._kept: dict[int, KeptLayer] = {}
        self._copies = HostCopies()

    def add(self, layer: int, step: TokenStream, *, last: bool = False) -> None:
        """Add the stream after a block to a layer; ``last``: no block follows."""
        plan = step.state.plan
        assert plan is not None
        if layer not in self._kept:
            on_host = len(self._kept) < plan.host_layers
            self._kept[layer] = KeptLayer(step.x.device, self._copies if on_host else None)
            step.state.settle = self._copies.settle
        x = step.dense()
        self._kept[layer].add(x, changes=x is step.x and not last)

    def done(self) -> dict[int, KeptLayer]:
        """All layers, after the last block."""
        self._copies.settle()
        return self._kept
