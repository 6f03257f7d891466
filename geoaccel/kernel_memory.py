"""Memory that an attention kernel allocates in addition to its arguments and its result."""

from __future__ import annotations

from geoaccel.attention import Held, Tokens

CODES, ROUNDING = 3, 8
"""``fp8``, per channel: bytes of the codes of query, key and value; and of the float32 copies while one is rounded."""


def kernel_bytes(kernel: str, tokens: Tokens, held: Held) -> float:
    """Peak bytes inside the kernel of one attention.

    Args:
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
        tokens: Tokens of the attention.
        held: Gives the fractions of them that are queries and keys.
    """
    queries, keys = held.queries * tokens.count, held.keys * tokens.count
    if kernel == "matmul":  # logits, and their softmax
        return 2 * tokens.heads * queries * keys * tokens.element
    if kernel == "fp8":
        largest = max(queries, keys) * tokens.width
        return (queries + (CODES - 1) * keys) * tokens.width + (ROUNDING + tokens.element) * largest
    return 0.0
