"""Rounding to e4m3 by arithmetic, in Triton: what hardware and torch do where the interpreter cannot."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """The nearest number of e4m3, ties to even, for 0 <= x <= 448; in float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 the numbers are 2^-9 apart, as are those of float32 from 2^14 on.
    return tl.where(x < 0.015625, (x + 24576.0) - 24576.0, normal)
