"""The update transformer of the point tracker: tracks attend over time, and to each other through virtual tracks.

Shape letters of this file: N tracks, V virtual tracks, L and M lengths of two token sequences, n sequences in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.models.layers.block import Mlp

# Attention weights at a time: 128 MiB in float32.
CHUNK_WEIGHTS = 2**25


def attend(
    attention: nn.MultiheadAttention,
    x: Tensor,  # [n, L, C]
    context: Tensor,  # [n, M, C]
) -> Tensor:  # [n, L, C]
    """Attention of every sequence to its context, ``CHUNK_WEIGHTS`` of its n * A * L * M weights at a time.

    The weights are materialised as in the released network: fused kernels sum in another order, and the tracker
    amplifies that. Self-attention is called with one tensor, not equal ones, as there: torch has a kernel for it.
    """
    pieces = max(1, CHUNK_WEIGHTS // (attention.num_heads * x.shape[1] * context.shape[1]))
    if x is context:
        return torch.cat([attention(piece, piece, piece)[0] for piece in x.split(pieces)])
    both = zip(x.split(pieces), context.split(pieces), strict=True)
    return torch.cat([attention(piece, seen, seen)[0] for piece, seen in both])


class TrackBlock(nn.Module):
    """Self-attention block whose residual stream is the *normed* input, as in the released network."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,  # [n, L, C]
    ) -> Tensor:  # [n, L, C]
        x = self.norm1(x)
        x = x + attend(self.attn, x, x)
        return x + self.mlp(self.norm2(x))


class TrackCrossBlock(nn.Module):
    """Cross-attention block; its residual stream, too, is the normed input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,  # [n, L, C]
        context: Tensor,  # [n, M, C]
    ) -> Tensor:  # [n, L, C]
        x = self.norm1(x)
        x = x + attend(self.cross_attn, x, self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class UpdateFormer(nn.Module):
    """Predicts an update of every track from its tokens.

    Each layer attends over time within a track, then across the tracks of a frame. The second step goes through V
    learned virtual tracks, so it costs N * V instead of N^2.

    Args:
        input_dim: Width of the incoming tokens.
        hidden_size: Width C.
        output_dim: Width of the update.
        depth: Layers.
        num_heads: Attention heads A.
        num_virtual_tracks: V.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_size: int,
        output_dim: int,
        *,
        depth: int,
        num_heads: int,
        num_virtual_tracks: int,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"width {hidden_size} does not divide into {num_heads} heads; choose a divisor of {hidden_size}"
            )
        self.num_virtual_tracks = num_virtual_tracks
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_transform = nn.Linear(input_dim, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)
        self.flow_head = nn.Linear(hidden_size, output_dim)
        self.virual_tracks = nn.Parameter(torch.randn(1, num_virtual_tracks, 1, hidden_size))  # sic, in checkpoints

        def blocks(kind: type[nn.Module]) -> nn.ModuleList:
            return nn.ModuleList(kind(hidden_size, num_heads) for _ in range(depth))

        self.time_blocks = blocks(TrackBlock)
        self.space_virtual_blocks = blocks(TrackBlock)
        self.space_point2virtual_blocks = blocks(TrackCrossBlock)
        self.space_virtual2point_blocks = blocks(TrackCrossBlock)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A newly initialised network leaves every track where it is.
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)

    def forward(
        self,
        tokens: Tensor,  # [B, N, S, input_dim]
    ) -> Tensor:  # [B, N, S, output_dim]
        entry = self.input_transform(self.input_norm(tokens))
        batch, num_tracks, frames, _ = entry.shape
        virtual = self.virual_tracks.expand(batch, -1, frames, -1)
        x = torch.cat([entry, virtual], dim=1)
        layers = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            strict=True,
        )
        for over_time, gather, mix, scatter in layers:
            x = over_time(x.flatten(0, 1)).unflatten(0, (batch, -1))
            per_frame = x.transpose(1, 2).flatten(0, 1)  # [B * S, N + V, C]
            points, virtual = per_frame.split([num_tracks, self.num_virtual_tracks], dim=1)
            virtual = mix(gather(virtual, points))
            points = scatter(points, virtual)
            x = torch.cat([points, virtual], dim=1).unflatten(0, (batch, frames)).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :num_tracks] + entry))
