"""The transformer block of encoder, aggregator and heads."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import DENSE, AttentionContext, Mixer
from geoaccel.errors import UserError
from geoaccel.models.layers.chosen_keys import can_choose, project_chosen
from geoaccel.models.layers.compiled import add, add_norm, gelu_linear, queries_and_keys

# Without gradients an MLP runs over this many tokens at a time: its hidden layer is four times as wide as the stream,
# and at a thousand frames it would otherwise be the largest tensor of the whole forward.
MLP_CHUNK_TOKENS = 65_536


class Attention(nn.Module):
    """Multi-head self-attention with a mixer slot.

    Accepts a dense batch of sequences [n, N, C], or packed rows [T, C] with segment lengths in the context.
    """

    mixer: Mixer

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"width {dim} does not divide into {num_heads} heads; choose a divisor of {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.mixer = DENSE

    def forward(
        self,
        x: Tensor,  # [n, N, C] or [T, C]
        context: AttentionContext,
    ) -> Tensor:  # as x
        tokens = x if x.ndim == 3 else x[None]
        read = self._reads_keys(tokens, context)
        if read is None:
            q, k, v = (t.transpose(1, 2) for t in self.project(tokens, context.rope))
        else:
            q, k, v = project_chosen(self, tokens, context.rope, read)
        mixed, restore = self.mixer(q, k, v, tokens, context)
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        if restore is not None:
            out = restore(out)
        return out if x.ndim == 3 else out[0]

    def _reads_keys(self, tokens: Tensor, context: AttentionContext) -> Tensor | None:  # tokens [n, N, C]
        """Tokens whose keys and values are computed; None: all tokens.

        Not measured on CUDA: it would add operations there, where matrix products are fast.
        """
        if tokens.device.type != "cpu" or not hasattr(self.mixer, "reads_keys") or not can_choose(self):
            return None
        read = self.mixer.reads_keys(tokens, self.num_heads, context)
        return None if read is None or read.shape[1] == tokens.shape[1] else read

    def project(
        self,
        tokens: Tensor,  # [n, N, C]
        rope: tuple[Tensor, Tensor] | None,  # tables of these tokens
    ) -> tuple[Tensor, Tensor, Tensor]:  # [n, N, A, D] each
        """Queries and keys, normed and rotated, and values."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
        return *queries_and_keys(qkv, self.q_norm, self.k_norm, rope), qkv[:, :, 2]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:  # [..., out]
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or rows <= MLP_CHUNK_TOKENS:
            return gelu_linear(self.fc1(x), self.fc2)
        chunks = x.reshape(rows, -1).split(MLP_CHUNK_TOKENS)
        return torch.cat([gelu_linear(self.fc1(chunk), self.fc2) for chunk in chunks]).reshape(*x.shape[:-1], -1)


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202) under DINOv2's names: half of the hidden layer gates the other half.

    The hidden width is two thirds of the usual one, in multiples of 8.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:  # [..., C]
        rows = x.reshape(-1, x.shape[-1])
        chunks = (rows,) if torch.is_grad_enabled() else rows.split(MLP_CHUNK_TOKENS)
        out = []
        for chunk in chunks:
            gate, value = self.w12(chunk).chunk(2, dim=-1)
            hidden = F.silu(gate).mul_(value)
            del gate, value  # both keep all of w12's output alive
            out.append(self.w3(hidden))
            del hidden
        return (out[0] if len(out) == 1 else torch.cat(out)).reshape(x.shape)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: ``x += ls1(attn(norm1(x)))``, then ``x += ls2(mlp(norm2(x)))``.

    Args:
        dim: Width C.
        num_heads: Attention heads A.
        mlp_ratio: Hidden width of the MLP over C.
        qk_norm: LayerNorm over each head's queries and keys (its epsilon is always 1e-5).
        norm_eps: Epsilon of ``norm1`` and ``norm2``.
        layer_scale: Initial residual factor, or None for no such parameter.
        gated: The MLP is gated.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        layer_scale: float | None = 0.01,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = (GatedMlp if gated else Mlp)(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,  # [n, N, C] or [T, C]
        context: AttentionContext,
    ) -> Tensor:  # as x
        return self.behind_attention(x, self.attn(self.norm1(x), context))

    def behind_attention(
        self,
        x: Tensor,  # [.., C]
        y: Tensor,  # [.., C]
    ) -> Tensor:  # [.., C]
        """The stream x plus the attention's output y, and then plus the MLP's output."""
        x, normed = add_norm(x, y, self.ls1, self.norm2)
        del y  # otherwise it stays alive during the MLP
        return add(x, self.mlp(normed), self.ls2)


def blocks_of(modules: nn.ModuleList) -> list[Block]:
    """The blocks in a list of modules; `nn.ModuleList` says of its members no more than that they are modules."""
    return cast("list[Block]", list(modules))
