"""e4m3, the 8-bit float of 4 exponent and 3 mantissa bits without infinity: its limits, and how a CPU decodes it."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Scales below are flushed to zero by some devices.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

UNIT = 256
"""The unit of :func:`in_units`."""


def in_units(codes: Tensor) -> Tensor:
    """Codes decoded to float32, over ``UNIT``; on a CPU faster than torch's cast. NaN becomes 480 / UNIT.

    One step to the left of a half-precision number's bits, with the sign in place, the bits of an e4m3 number mean the
    same but for 2^8, subnormal numbers included.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign fills the upper half
    return ((bits << 7) & -0x4001).view(torch.float16).float()
