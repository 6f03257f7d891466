"""Two-dimensional rotary position embedding.

The first half of a head's D channels encodes y, the second half x. Within each half, channel i is rotated together with
channel i + D/4 by the angle ``position * base^(-4 i / D)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.errors import UserError


def rope_tables(
    positions: Tensor,  # [L, 2], integer (y, x)
    head_dim: int,
    base: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [L, 2, D / 4] each
    """Cosines and sines of every token's angles.

    The angles are computed in float32 whatever the dtype: in bfloat16 an angle of 30 rad is off by up to 0.06.
    """
    if head_dim % 4:
        raise UserError(f"2-D rotary embedding needs a head dimension divisible by 4, got {head_dim}")
    exponent = torch.arange(0, head_dim // 2, 2, device=positions.device, dtype=torch.float32) / (head_dim // 2)
    # Times the inverse, as released: to the last bit the same angles, and so the same aggregator.
    angles = positions[..., None].float() * (1.0 / base**exponent)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(
    x: Tensor,  # [n, L, A, D]
    tables: tuple[Tensor, Tensor],  # [L, 2, D / 4] each
) -> Tensor:  # [n, L, A, D]
    """Rotate every head's channels by the token's position."""
    cos, sin = (table[:, None].to(x.dtype) for table in tables)  # [L, 1, 2, D / 4]
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return rotated.flatten(-3)
