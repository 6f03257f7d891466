"""Reference implementations in torch of the fused kernels.

Each takes and gives what its kernel does. They say what is computed, in float32 and all at once; where a device has no
kernel, the layers and methods run the operations that they always ran.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.kernels.e4m3 import E4M3, E4M3_MAX, SMALLEST_SCALE


def quantize_rows(
    x: Tensor,  # [R, K]
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # [R, K] e4m3, [R, 1] float32
    """Round every row, or GELU of it, to e4m3 after scaling its largest magnitude to 448.

    A row of zeros stays zero; a row with NaN or infinity has no scale and becomes NaN.
    """
    x = F.gelu(x) if gelu else x
    scale = (x.abs().amax(dim=1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (x.float() / scale).to(E4M3), scale


def add_norm(
    x: Tensor,  # [R, C]
    y: Tensor,  # [R, C]
    gamma: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # [R, C] each, in the dtype of x
    """``x + gamma * y``, and the layer norm of that."""
    added = y.float() if gamma is None else y.float() * gamma.float()
    total = (x.float() + added).to(x.dtype)
    return total, F.layer_norm(total.float(), total.shape[1:], weight.float(), bias.float(), eps).to(x.dtype)


def rotate_heads(
    qkv: Tensor,  # [n, N, 3, A, D]
    q_norm: tuple[Tensor, Tensor] | None,  # [D] each
    k_norm: tuple[Tensor, Tensor] | None,  # [D] each
    eps: float,
    rope: tuple[Tensor, Tensor] | None,  # [L, 2, D / 4] each
) -> tuple[Tensor, Tensor]:  # [n, A, N, D] each
    """Queries and keys of every head, normed over its channels and rotated by the token's angles."""
    out = []
    for x, norm in zip(qkv.unbind(2)[:2], (q_norm, k_norm), strict=True):
        x = x.float()
        if norm is not None:
            x = F.layer_norm(x, x.shape[-1:], norm[0].float(), norm[1].float(), eps)
        if rope is not None:
            # Angles repeat with period L; a pair of channels is one complex number.
            cos, sin = (table.float()[:, None] for table in rope)
            pairs = x.unflatten(1, (-1, len(cos))).unflatten(-1, (2, 2, -1)).transpose(-1, -2).contiguous()
            turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
            x = torch.view_as_real(turned).transpose(-1, -2).flatten(-3).flatten(1, 2)
        out.append(x.to(qkv.dtype).transpose(1, 2).contiguous())
    return out[0], out[1]


def match_blocks(
    x: Tensor,  # [B, A, T, D]
    sources: Tensor,  # [G, s], int64
    targets: Tensor,  # [G, m], int64
    least_norm: float,
) -> Tensor:  # [B, A, G, s], int64
    """Index of each source's most similar target within its block, by cosine; ties go to the first.

    In float64, whatever the settings of products are.
    """
    return block_scores(x, sources, targets, least_norm).max(-1).indices


def block_scores(
    x: Tensor,  # [B, A, T, D]
    sources: Tensor,  # [G, s], int64
    targets: Tensor,  # [G, m], int64
    least_norm: float,
) -> Tensor:  # [B, A, G, s, m], float64
    """Cosines of every source and target of a block."""
    units = x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=least_norm)
    return units[:, :, sources] @ units[:, :, targets].transpose(-1, -2)


def deviation(
    x: Tensor,  # [B, A, T, D]
    group_of: Tensor,  # [B, A, T], int64
    merged: Tensor,  # [B, A, M, D]
) -> Tensor:  # [B, A, T], float32
    """Squared distance of every token from the mean of its group."""
    mean = merged.gather(2, group_of[..., None].expand(*group_of.shape, x.shape[-1]))
    return (mean.float() - x.float()).square().sum(-1)


def join(
    first: Tensor,  # [n, A, N, D]
    first_sum: Tensor,  # [n, A, N], float32
    second: Tensor,  # [n, A, N, D]
    second_sum: Tensor,  # [n, A, N], float32
    bias: float,
) -> None:
    """Combine two attentions of the same queries, in place of the first; ``bias`` is on all logits of the second."""
    second_sum = second_sum + bias
    share = torch.sigmoid(second_sum - first_sum)[..., None]
    first.copy_(torch.lerp(first.float(), second.float(), share))
    first_sum.copy_(torch.logaddexp(first_sum, second_sum))


def pick(
    k: Tensor,  # [n, A, N, D]
    v: Tensor,  # [n, A, N, D]
    index: Tensor,  # [H, M], int64
) -> tuple[Tensor, Tensor]:  # [n, A, M, D] each
    """Keys and values of the tokens of each head, or of all heads if H = 1."""
    if len(index) == 1:
        return k.index_select(2, index[0]), v.index_select(2, index[0])
    places = index[None, :, :, None].expand(len(k), -1, -1, k.shape[3])
    return k.gather(2, places), v.gather(2, places)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative error."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size if size else math.inf)
