"""Two attentions of the same queries to different keys combined by their log-sum-exp, in Triton.

torch spells it as five operations, two of which read or write all outputs. Here each is read once.

The reference implementation is :func:`geoaccel.kernels.twins.join`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_QUERIES = 64


@triton.jit
def _join_kernel(
    first,  # [n, A, N, D], any strides but the last
    first_sum,  # [n, A, N], any strides
    second,  # [n, A, N, D], any strides but the last
    second_sum,  # [n, A, N], any strides
    first_batch,
    first_head,
    first_token,
    second_batch,
    second_head,
    second_token,
    first_sum_batch,
    first_sum_head,
    first_sum_token,
    second_sum_batch,
    second_sum_head,
    second_sum_token,
    rows,  # n * A * N
    heads,
    length,  # N
    dim,
    bias,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    channel = tl.arange(0, TILE_D)
    inside = row < rows
    both = inside[:, None] & (channel[None, :] < dim)
    token, head, scene = row % length, row // length % heads, row // length // heads
    total = first_sum + scene * first_sum_batch + head * first_sum_head + token * first_sum_token
    own = second_sum + scene * second_sum_batch + head * second_sum_head + token * second_sum_token
    a = tl.load(total, mask=inside, other=0.0)
    b = tl.load(own, mask=inside, other=0.0) + bias
    most = tl.maximum(a, b)
    weight_a, weight_b = tl.exp(a - most), tl.exp(b - most)
    weights = weight_a + weight_b
    place = (scene * first_batch + head * first_head + token * first_token)[:, None] + channel[None, :]
    other = (scene * second_batch + head * second_head + token * second_token)[:, None] + channel[None, :]
    x = tl.load(first + place, mask=both, other=0.0).to(tl.float32)
    y = tl.load(second + other, mask=both, other=0.0).to(tl.float32)
    mixed = x + (weight_b / weights)[:, None] * (y - x)
    tl.store(first + place, mixed.to(first.dtype.element_ty), mask=both)
    tl.store(total, most + tl.log(weights), mask=inside)


def join(
    first: Tensor,  # [n, A, N, D]
    first_sum: Tensor,  # [n, A, N], float32
    second: Tensor,  # [n, A, N, D]
    second_sum: Tensor,  # [n, A, N], float32
    bias: float,
) -> None:
    """Make of the first what an attention to the keys of both gives, and its log-sum.

    Args:
        first, second: What either attention gave; any strides but the last. The first is written to.
        first_sum, second_sum: Logarithm of the sum of each query's exponentials. The first is written to.
        bias: Added to all logits of the second.
    """
    batch, heads, length, dim = first.shape
    rows = batch * heads * length
    if rows:
        _join_kernel[(triton.cdiv(rows, TILE_QUERIES),)](
            first,
            first_sum,
            second,
            second_sum,
            *first.stride()[:3],
            *second.stride()[:3],
            *first_sum.stride(),
            *second_sum.stride(),
            rows,
            heads,
            length,
            dim,
            bias,
            TILE_QUERIES,
            triton.next_power_of_2(dim),
        )
