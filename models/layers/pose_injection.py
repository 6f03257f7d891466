"""Attention with camera poses (PRoPE, Li et al., arXiv 2507.10496), and the block around it.

Half of a head's channels are groups of four, which the camera matrix transforms; a quarter is rotated by the column of
the patch, a quarter by its row. The product of a query and a key then depends on the relative pose of their cameras,
and values are returned in the query's camera frame. The rotation is opposite to that of :mod:`layers.rope`, and columns
come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext
from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.models.layers.block import Attention, Block
from geoaccel.models.layers.stream import TokenStream

ROPE_BASE = 100.0

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PosedTokens:
    """The patches of the frames with known poses; no other tokens take part.

    Attributes:
        rows: [T], their rows of the stream.
        context: Context of their attention: scenes as segments, and the weights of merged keys.
        cam_from_world: [T, 4, 4], of each token's frame, and world_from_cam its inverse.
        column, row: Cosines and sines [T, D / 8] of each token's angles.
    """

    rows: Tensor
    context: AttentionContext
    cam_from_world: Tensor
    world_from_cam: Tensor
    column: Rotation
    row: Rotation

    @classmethod
    def of(
        cls,
        stream: TokenStream,
        world_from_cam: Tensor,  # [B, S, 4, 4]
        posed: Sequence[Sequence[bool]],  # B x S
        head_dim: int,
    ) -> PosedTokens:
        """The tokens of a stream, dense or packed."""
        layout, packing, device = stream.layout, stream.packing, world_from_cam.device
        if packing is None:
            lengths: tuple[int, ...] = (layout.tokens_per_frame,) * (layout.batch * layout.frames)
            positions = layout.positions(device).repeat(len(lengths), 1)
        else:
            lengths, positions = packing.frame_lengths, packing.positions
        frame = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        known = torch.tensor(posed, device=device).flatten()
        rows = (known[frame] & (positions[:, 0] > 0)).nonzero()[:, 0]
        counts = [
            sum(lengths[scene * layout.frames + at] - layout.num_special for at, given in enumerate(frames) if given)
            for scene, frames in enumerate(posed)
        ]
        weights = None if packing is None or packing.log_weight is None else packing.log_weight[rows]
        context = AttentionContext("head", lengths=tuple(n for n in counts if n), log_weight=weights)
        matrices = world_from_cam.flatten(0, 1)[frame[rows]]
        place = positions[rows].float() - 1  # patches count from 0 here
        tables = (_tables(place[:, axis], head_dim // 8) for axis in (1, 0))
        return cls(rows, context, invert_rigid(matrices), matrices, *tables)


def _tables(
    position: Tensor,  # [T]
    pairs: int,
) -> Rotation:  # [T, pairs] each
    angles = position[:, None] * ROPE_BASE ** -(torch.arange(pairs, device=position.device) / pairs)
    return angles.cos(), angles.sin()


def _rotate(
    x: Tensor,  # [T, A, D / 4]
    table: Rotation,
    direction: int,
) -> Tensor:
    cos, sin = table[0][:, None], direction * table[1][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([cos * first + sin * second, cos * second - sin * first], dim=-1)


def move(
    x: Tensor,  # [T, A, D]
    matrices: Tensor,  # [T, 4, 4]
    tokens: PosedTokens,
    *,
    back: bool = False,
) -> Tensor:  # [T, A, D]
    """Each group of four channels times the token's matrix, and the other half rotated by its position."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    groups = x[..., :half].unflatten(-1, (-1, 4))
    moved = torch.einsum("tij,tagj->tagi", matrices, groups).flatten(-2)
    direction = -1 if back else 1
    column = _rotate(x[..., half : half + quarter], tokens.column, direction)
    row = _rotate(x[..., half + quarter :], tokens.row, direction)
    return torch.cat([moved, column, row], dim=-1)


class PoseAttention(Attention):
    """Multi-head attention between posed tokens; its mixer is never a merging method's."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, qk_norm=True)
        if self.head_dim % 8:
            raise UserError(f"attention with camera poses needs a head dimension divisible by 8, got {self.head_dim}")

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [T, C]
        tokens: PosedTokens,
    ) -> Tensor:  # [T, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        dtype = v.dtype
        q = move(q.float(), tokens.cam_from_world.mT, tokens)
        k, v = (move(t.float(), tokens.world_from_cam, tokens) for t in (k, v))
        q, k, v = (t.to(dtype).transpose(0, 1)[None] for t in (q, k, v))
        mixed, _ = self.mixer(q, k, v, x[None], tokens.context)
        out = move(mixed[0].transpose(0, 1).float(), tokens.cam_from_world, tokens, back=True)
        return self.proj(out.to(dtype).flatten(1))


class PoseInjection(Block):
    """What given poses add to the patches: attention and MLP in parallel on the same input, without a skip."""

    def __init__(self, dim: int, num_heads: int, layer_scale: float) -> None:
        super().__init__(dim, num_heads, norm_eps=1e-6, layer_scale=layer_scale)
        self.attn = PoseAttention(dim, num_heads)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [T, C]
        tokens: PosedTokens,
    ) -> Tensor:  # [T, C]
        return self.ls1(self.attn(self.norm1(x), tokens)) + self.ls2(self.mlp(self.norm2(x)))

    def inject(self, stream: TokenStream, tokens: PosedTokens) -> TokenStream:
        """The stream with what is added to it."""
        rows = stream.rows()
        added = self(rows[tokens.rows], tokens).to(rows.dtype)
        return stream.plus_rows(torch.zeros_like(rows).index_copy(0, tokens.rows, added))
