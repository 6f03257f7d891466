"""Two-dimensional rotary position embedding.

The first half of a head's D channels encodes y, the second half x. Within each half, channel i is rotated together with
channel i + D/4 by the angle ``position * base^(-4 i / D)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.kept import kept
from geoaccel.layout import TokenLayout

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of L tokens, [L, 2, D / 4] each."""


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
    # Times the inverse, as released: bit-identical angles, and so the same aggregator.
    angles = positions[..., None].float() * (1.0 / base**exponent)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@kept
def frame_tables(
    grid: tuple[int, int],
    num_special: int,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    flat: bool = False,
) -> Rope:
    """The tables of one dense frame of special tokens and h x w patches.

    With ``flat`` they only distinguish patches from special tokens: all patches are at (1, 1).
    """
    positions = TokenLayout(1, 1, grid, num_special).positions(device)
    return rope_tables(positions.clamp(max=1) if flat else positions, head_dim, base, dtype)


def apply_rope(
    x: Tensor,  # [n, N, A, D]
    tables: Rope,  # of L tokens
) -> Tensor:  # [n, N, A, D]
    """Rotate every head's channels by the token's position.

    Positions repeat every L tokens: for frames of one size, N is S * L.
    """
    cos, sin = (table.to(x.dtype) for table in tables)  # [L, 2, D / 4]
    cos, sin = torch.stack([cos, cos], dim=2), torch.stack([-sin, sin], dim=2)  # of both channels of a pair
    cos, sin = (table.flatten(1)[:, None] for table in (cos, sin))  # [L, 1, D]
    rounds = x.unflatten(1, (-1, len(cos)))  # [n, S, L, A, D]
    others = rounds.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)  # the other channel of each pair
    return (rounds * cos).addcmul_(others, sin).flatten(1, 2)
