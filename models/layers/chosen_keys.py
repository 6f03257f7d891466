"""The QKV projection of an attention that reads the keys and values of some tokens only: others are not computed."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.models.layers.rope import Rope, apply_rope


class Projection(Protocol):
    """The parts of an attention that compute queries, keys and values."""

    num_heads: int
    head_dim: int
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module


def can_choose(attention: Projection) -> bool:
    """Whether keys of some tokens can be computed separately: the projection is a plain linear layer without hooks.

    With gradients all are computed, as autograd would keep what is gathered for each head. The same goes for compiled
    code: compiling a graph with every head of every layer unrolled would take minutes.
    """
    qkv = attention.qkv
    return (
        type(qkv) is nn.Linear
        and type(qkv.weight) in (nn.Parameter, Tensor)  # other types may not be sliced
        and not any(_replaced_or_heard(module) for module in (qkv, attention.q_norm, attention.k_norm))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")  # it would give queries another dtype than the tokens have
    )


def _replaced_or_heard(module: nn.Module) -> bool:
    """Whether a module's forward was replaced, or it has hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in vars(module) or any(hooks)


def project_chosen(
    attention: Projection,
    tokens: Tensor,  # [n, N, C]
    rope: Rope | None,  # tables of these tokens
    read: Tensor,  # [H, M], int64, on the CPU
) -> tuple[Tensor, Tensor, Tensor]:  # [n, A, N, D], [n, A, M, D], [n, A, M, D]
    """Queries of all tokens, and keys and values of those that each head reads, or all heads where H = 1.

    Tokens are gathered for one head at a time: for all at once they would be larger than the input.
    """
    heads, dim = attention.num_heads, attention.head_dim
    of_queries, *of_keys = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    queries, *keys = attention.qkv.weight.chunk(3)  # [A D, C] each
    q = attention.q_norm(F.linear(tokens, queries, of_queries).unflatten(-1, (heads, dim)))
    q = q if rope is None else apply_rope(q, rope)
    together = heads // len(read)  # heads that read the same
    found = []
    for own, rows in enumerate(read):
        part = slice(own * together * dim, (own + 1) * together * dim)
        weight = torch.cat([w[part] for w in keys])
        bias = None if of_queries is None else torch.cat([b[part] for b in of_keys])
        k, v = F.linear(tokens.index_select(1, rows), weight, bias).unflatten(-1, (2, together, dim)).unbind(2)
        k = attention.k_norm(k)
        if rope is not None:
            k = apply_rope(k, (rope[0][rows % len(rope[0])], rope[1][rows % len(rope[1])]))
        found.append((k, v))  # [n, M, A / H, D]
    k, v = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*found, strict=True))
    return q.to(v.dtype).transpose(1, 2), k.to(v.dtype), v  # norms may return another dtype
