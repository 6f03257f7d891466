"""Keys and values of chosen tokens in Triton: both in one pass, for all heads or for each its own.

torch spells it as a gather of either, which reads the place of a token anew for every channel.

The reference implementation is :func:`geoaccel.kernels.twins.pick`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_TOKENS = 64


@triton.jit
def _pick_kernel(
    k,  # [n, A, N, D], any strides but the last
    v,  # [n, A, N, D], any strides but the last
    index,  # [H, M], int64
    keys,  # [n, A, M, D]
    values,  # [n, A, M, D]
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    chosen,  # M
    dim,
    tiles,
    OWN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    scene, head = row // heads, row % heads
    place = program % tiles * TILE_M + tl.arange(0, TILE_M)
    channel = tl.arange(0, TILE_D)
    there = place < chosen
    inside = there[:, None] & (channel[None, :] < dim)
    own = index + head * chosen if OWN else index
    token = tl.load(own + place, mask=there, other=0)[:, None]
    to = (row * chosen + place)[:, None] * dim + channel[None, :]
    key = tl.load(k + scene * k_batch + head * k_head + token * k_token + channel[None, :], mask=inside)
    tl.store(keys + to, key, mask=inside)
    value = tl.load(v + scene * v_batch + head * v_head + token * v_token + channel[None, :], mask=inside)
    tl.store(values + to, value, mask=inside)


def pick(
    k: Tensor,  # [n, A, N, D]
    v: Tensor,  # [n, A, N, D]
    index: Tensor,  # [H, M], int64
) -> tuple[Tensor, Tensor]:  # [n, A, M, D] each
    """Keys and values of chosen tokens.

    Args:
        k, v: Of all tokens.
        index: The tokens of each head, or of all heads where H = 1.
    """
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, dim = k.shape
    own, chosen = index.shape
    keys, values = (torch.empty(batch, heads, chosen, dim, dtype=x.dtype, device=x.device) for x in (k, v))
    if keys.numel():
        tiles = triton.cdiv(chosen, TILE_TOKENS)
        _pick_kernel[(batch * heads * tiles,)](
            k,
            v,
            index.contiguous(),
            keys,
            values,
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            chosen,
            dim,
            tiles,
            own > 1,
            TILE_TOKENS,
            triton.next_power_of_2(dim),
        )
    return keys, values
