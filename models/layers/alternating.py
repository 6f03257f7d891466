"""Frame attention and global attention in turn, on dense or packed tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from geoaccel.attention import AttentionContext
from geoaccel.layout import AttentionKind, Packing, TokenLayout
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.rope import rope_tables


class TokenPacker(Protocol):
    """Merges the residual stream before the first block; everything after runs on the packed rows."""

    def __call__(
        self,
        x: Tensor,  # [B, S, P, C]
        layout: TokenLayout,
        state: dict[Any, Any],
    ) -> tuple[Tensor, Packing]:  # [T, C]
        ...


@dataclass
class TokenStream:
    """The tokens between two blocks.

    Attributes:
        x: [B, S, P, C], or [T, C] where packed.
        layout: The dense layout.
        rope: Rotary tables of one dense frame, or of all packed rows.
        packing: How the rows stand for dense tokens; None where the tokens are dense.
        state: Notes that methods keep for the length of one forward.
    """

    x: Tensor
    layout: TokenLayout
    rope: tuple[Tensor, Tensor]
    packing: Packing | None = None
    state: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def start(
        cls, x: Tensor, layout: TokenLayout, head_dim: int, rope_base: float, packer: TokenPacker | None, state: dict
    ) -> TokenStream:
        """Tokens [B, S, P, C] as they enter the first block, packed if there is a packer."""
        packing = None
        if packer is not None:
            x, packing = packer(x, layout, state)
        positions = layout.positions(x.device) if packing is None else packing.positions
        return cls(x, layout, rope_tables(positions, head_dim, rope_base, x.dtype), packing, state)

    def dense(self) -> Tensor:  # [B, S, P, C]
        return self.x if self.packing is None else self.packing.unpack(self.x)

    def through(self, block: Block, kind: AttentionKind, index: int) -> TokenStream:
        """One block further."""
        if self.packing is not None:
            lengths, log_weight = self.packing.lengths(kind), self.packing.weight.log()
            context = AttentionContext(kind, index, self.layout, self.rope, lengths, log_weight, self.state)
            return replace(self, x=block(self.x, context))
        rope = self.rope
        batch, frames, per_frame, _ = self.x.shape
        if kind == "global":
            rows = self.x.reshape(batch, frames * per_frame, -1)
            rope = (rope[0].repeat(frames, 1, 1), rope[1].repeat(frames, 1, 1))
        else:
            rows = self.x.reshape(batch * frames, per_frame, -1)
        context = AttentionContext(kind, index, self.layout, rope, state=self.state)
        return replace(self, x=block(rows, context).reshape(self.x.shape))


def alternate(stream: TokenStream, blocks: Iterable[tuple[AttentionKind, Block]]) -> Iterator[TokenStream]:
    """Run the blocks in order and yield the stream after each."""
    count: dict[str, int] = {}
    for kind, block in blocks:
        index = count.get(kind, 0)
        count[kind] = index + 1
        stream = stream.through(block, kind, index)
        yield stream
