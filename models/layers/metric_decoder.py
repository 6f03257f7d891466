"""One number per scene: a learned query that attends to all tokens of all frames."""

from __future__ import annotations

from torch import Tensor, nn

from geoaccel.attention_kernels import attend
from geoaccel.errors import UserError
from geoaccel.models.layers.block import Mlp
from geoaccel.models.layers.rope import apply_rope


class CrossAttention(nn.Module):
    """Multi-head cross-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"width {dim} does not divide into {num_heads} heads; choose a divisor of {dim}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, n, C]
        context: Tensor,  # [B, S, P, C]
        rope: tuple[Tensor, Tensor],  # tables of one frame of the context; x is at position (0, 0)
    ) -> Tensor:  # [B, n, C]
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1))

        k = apply_rope(heads(self.k_proj(context)).flatten(0, 1), rope).unflatten(0, context.shape[:2]).flatten(1, 2)
        v = heads(self.v_proj(context)).flatten(1, 2)
        q = heads(self.q_proj(x))
        out = attend(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Pre-norm block without self-attention: ``x += cross(norm2(x), norm_y(y))``, then ``x += mlp(norm3(x))``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_y = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.cross_attn(self.norm2(x), self.norm_y(context), rope)
        return x + self.mlp(self.norm3(x))


class MetricDecoder(nn.Module):
    """Input linear layers, blocks of cross-attention to the same context, and an output linear layer."""

    def __init__(self, dim_in: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.projects_x = nn.Linear(dim_in, dim)
        self.projects_y = nn.Linear(dim_in, dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth))
        self.linear_out = nn.Linear(dim, dim)

    def forward(
        self,
        query: Tensor,  # [1, 1, 2 * C]
        features: Tensor,  # [B, S, P, 2 * C]
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:  # [B, 1, dim]
        dtype = self.projects_y.weight.dtype
        context = self.projects_y(features.to(dtype))
        x = self.projects_x(query.to(dtype).expand(len(features), -1, -1))
        for block in self.blocks:
            x = block(x, context, rope)
        return self.linear_out(x)
