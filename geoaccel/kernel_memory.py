"""Memory that attention kernels take beside their arguments and the result."""

from __future__ import annotations

from geoaccel.attention import Held, Tokens

CODES, ROUNDING = 3, 8
"""``fp8``: bytes of the codes of a query, a key and a value; and of one of these while it is rounded, in float32."""


def kernel_bytes(kernel: str, tokens: Tokens, held: Held) -> float:
    """What one attention takes inside its kernel.

    Args:
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
        tokens: Of the attention.
        held: Says which share of them are queries and keys.
    """
    queries, keys = held.queries * tokens.count, held.keys * tokens.count
    if kernel == "matmul":  # logits, and their softmax
        return 2 * tokens.heads * queries * keys * tokens.element
    if kernel == "fp8":
        largest = max(queries, keys) * tokens.width
        return (queries + (CODES - 1) * keys) * tokens.width + (ROUNDING + tokens.element) * largest
    return 0.0
