"""The small operations around a block's matrix products: one kernel launch each if compiled, else torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.kernels.fused import fused
from geoaccel.linears import QuantizedLinear
from geoaccel.models.layers.rope import apply_rope


def queries_and_keys(
    qkv: Tensor,  # [n, N, 3, A, D]
    q_norm: nn.Module,
    k_norm: nn.Module,
    rope: tuple[Tensor, Tensor] | None,  # [L, 2, D / 4] each, repeated every L of the N tokens
) -> tuple[Tensor, Tensor]:  # [n, N, A, D] each, in the dtype of qkv
    """Queries and keys, normed and rotated."""
    normed = not isinstance(q_norm, nn.Identity)
    plain = _plain(q_norm, k_norm) if normed else isinstance(k_norm, nn.Identity)
    if plain and (normed or rope is not None) and qkv.shape[-1] % 4 == 0:
        run = fused("rotate_heads", qkv)
        if run is not None:
            norms: Any = [(norm.weight, norm.bias) if normed else None for norm in (q_norm, k_norm)]
            q, k = run(qkv, *norms, q_norm.eps if normed else 0.0, rope)
            return q.transpose(1, 2), k.transpose(1, 2)
    q, k = q_norm(qkv[:, :, 0]), k_norm(qkv[:, :, 1])
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    # Under autocast the norms return float32 while the values stay in the narrow dtype: kernels need one dtype.
    return q.to(qkv.dtype), k.to(qkv.dtype)


def add(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    scale: nn.Module,
) -> Tensor:  # [..., C]
    """``x + scale(y)``, scale as in :func:`add_norm`."""
    gamma = getattr(scale, "gamma", None)
    return torch.addcmul(x, y, gamma) if x.is_cuda and gamma is not None else x + scale(y)


def add_norm(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    scale: nn.Module,
    norm: nn.Module,
) -> tuple[Tensor, Tensor]:  # [..., C] each
    """``x + scale(y)``, and its norm.

    Args:
        x: The residual stream.
        y: Output of a branch.
        scale: Multiplies every channel by its ``gamma``, or is the identity.
        norm: The norm after the sum.
    """
    gamma = getattr(scale, "gamma", None)
    # Under autocast torch norms in float32; so does this if the stream is in float32.
    if _plain(norm) and all(t is None or t.dtype == x.dtype for t in (gamma, *norm.parameters())):
        run = fused("add_norm", x)
        if run is not None and (y.dtype == x.dtype or x.dtype == torch.float32):
            rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, y))
            total, normed = run(*rows, gamma, norm.weight, norm.bias, norm.eps)
            return total.view(x.shape), normed.view(x.shape)
    total = add(x, y, scale)
    return total, norm(total)


def gelu_linear(
    x: Tensor,  # [..., C]
    linear: nn.Module,
) -> Tensor:  # [..., out]
    """A linear layer of the exact GELU of x."""
    if isinstance(linear, QuantizedLinear) and linear.takes_gelu(x):
        return linear(x, gelu=True)
    return linear(F.gelu(x))


def _plain(*norms: nn.Module) -> bool:
    """Whether they are layer norms with weight and bias, without hooks."""
    return all(
        type(norm) is nn.LayerNorm
        and norm.weight is not None
        and norm.bias is not None
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        for norm in norms
    )
