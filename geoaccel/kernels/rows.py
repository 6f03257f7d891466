"""Row-wise kernels in Triton, one pass each: rounding to e4m3, and a residual sum with the following norm.

The reference implementations are :func:`geoaccel.kernels.twins.quantize_rows` and
:func:`geoaccel.kernels.twins.add_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoaccel.kernels.e4m3 import E4M3, E4M3_MAX, SMALLEST_SCALE
from geoaccel.kernels.rounding import to_e4m3


@triton.jit
def _quantize_kernel(
    x,  # [rows, K]
    codes,  # [rows, K], e4m3, or float32 where it is not NATIVE
    scales,  # [rows], float32
    width,
    largest_code,
    smallest_scale,
    GELU: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, TILE_K)
    inside = channels < width
    values = tl.load(x + row * width + channels, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
        values = values.to(x.dtype.element_ty).to(tl.float32)  # as where torch keeps it in between
    size = tl.abs(values)
    # A maximum passes NaN over; infinity makes NaN of the whole row.
    size = tl.where(size == size, size, float("inf"))
    scale = tl.maximum(tl.max(size, axis=0) / largest_code, smallest_scale)
    scaled = values / scale
    rounded = scaled.to(tl.float8e4nv) if NATIVE else tl.where(scaled < 0, -to_e4m3(-scaled), to_e4m3(scaled))
    tl.store(codes + row * width + channels, rounded, mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(
    x: Tensor,  # [R, K]
    gelu: bool = False,
    *,
    native: bool = True,
) -> tuple[Tensor, Tensor]:  # [R, K] e4m3, [R, 1] float32
    """Every row rounded to e4m3 after scaling its largest magnitude to 448; a row with NaN or infinity becomes NaN.

    Args:
        x: Rows.
        gelu: Round GELU of them instead.
        native: False gives the numbers behind the codes, in float32, rounded by arithmetic: for Triton's interpreter,
            which does not round to eight-bit floats.
    """
    codes = torch.empty(x.shape, dtype=E4M3 if native else torch.float32, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if x.numel():
        tile = triton.next_power_of_2(x.shape[1])
        _quantize_kernel[(len(x),)](
            x.contiguous(),
            codes,
            scale,
            x.shape[1],
            E4M3_MAX,
            SMALLEST_SCALE,
            gelu,
            native,
            tile,
            num_warps=warps(tile),
        )
    return codes, scale


@triton.jit
def _add_norm_kernel(
    x,  # [rows, C]
    y,  # [rows, C]
    gamma,  # [C]
    weight,  # [C]
    bias,  # [C]
    total,  # [rows, C]
    normed,  # [rows, C]
    width,
    eps,
    SCALED: tl.constexpr,
    TILE_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, TILE_C)
    inside = channels < width
    places = row * width + channels
    added = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        added *= tl.load(gamma + channels, mask=inside, other=0.0).to(tl.float32)
    summed = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) + added
    narrow = summed.to(total.dtype.element_ty)
    tl.store(total + places, narrow, mask=inside)
    summed = narrow.to(tl.float32)
    mean = tl.sum(summed, axis=0) / width
    centred = tl.where(inside, summed - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    out = centred * scale * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    out += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + places, out.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor,  # [R, C]
    y: Tensor,  # [R, C]
    gamma: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # [R, C] each, in the dtype of x
    """``x + gamma * y``, and the layer norm of that.

    Args:
        x: The residual stream.
        y: What a branch adds to it.
        gamma: A factor for each channel; None: 1.
        weight, bias, eps: Of the norm.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        tile = triton.next_power_of_2(x.shape[1])
        # Where there is no factor any pointer does.
        factor = weight if gamma is None else gamma
        _add_norm_kernel[(len(x),)](
            x, y, factor, weight, bias, total, normed, x.shape[1], eps, gamma is not None, tile, num_warps=warps(tile)
        )
    return total, normed


def warps(tile: int) -> int:
    """Warps of a program that holds one row: about sixteen numbers a thread, where that many warps there are."""
    return max(1, min(16, tile // 512))
