"""Programs of a launch at the largest sizes: CUDA takes 2^31 - 1 along the first axis of a grid, 65,535 along others.

Triton's interpreter takes any number, so that nothing else would notice before a GPU does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geoaccel.kernels.fp8_reference import Operands

pytest.importorskip("triton")

TOKENS, HEADS, WIDTH, DIM = 1000 * 1041, 16, 1024, 64
"""A thousand frames of 392 x 518 in VGGT-1B."""

BLOCKS = 133_152
"""Of HTTM with blocks of (8, 2), all heads, at 200 frames."""


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def places(*shape: int) -> Tensor:
    return numbers(*shape, dtype=torch.int64)


def operands() -> Operands:
    codes = [numbers(1, HEADS, TOKENS, DIM, dtype=torch.float8_e4m3fn) for _ in range(2)]
    values = numbers(1, HEADS, DIM, TOKENS, dtype=torch.float8_e4m3fn)
    scales = [numbers(1, HEADS, TOKENS, dtype=torch.float32) for _ in range(2)]
    return Operands(codes[0], scales[0], codes[1], scales[1], values, numbers(1, HEADS, DIM, dtype=torch.float32), None)


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a few blocks": ("match", lambda m: m.best_match(numbers(BLOCKS, 14, DIM), numbers(BLOCKS, 2, DIM))),
    "all tokens": ("match", lambda m: m.best_match(numbers(1, TOKENS, WIDTH), numbers(1, TOKENS // 4, WIDTH))),
    "means of heads": (
        "match",
        lambda m: m.segment_mean(
            numbers(HEADS * TOKENS, DIM), places(HEADS * TOKENS), *(places(HEADS * TOKENS // 2) for _ in range(2))
        ),
    ),
    "match_blocks": (
        "blocks",
        lambda m: m.match_blocks(
            numbers(1, HEADS, TOKENS, DIM), places(BLOCKS // HEADS, 14), places(BLOCKS // HEADS, 2), 1e-6
        ),
    ),
    "deviation": (
        "blocks",
        lambda m: m.deviation(
            numbers(1, HEADS, TOKENS, DIM), places(1, HEADS, TOKENS), numbers(1, HEADS, TOKENS // 8, DIM)
        ),
    ),
    "rotate_heads": (
        "heads",
        lambda m: m.rotate_heads(numbers(1, TOKENS, 3, HEADS, DIM), None, None, 1e-5, None),
    ),
    "quantize_rows": ("rows", lambda m: m.quantize_rows(numbers(TOKENS, 4 * WIDTH), True)),
    "add_norm": (
        "rows",
        lambda m: m.add_norm(*(numbers(TOKENS, WIDTH) for _ in range(2)), *(numbers(WIDTH) for _ in range(3)), 1e-5),
    ),
    "decode_groups": (
        "nibbles",
        lambda m: m.decode_groups(
            numbers(4 * WIDTH, 2 * WIDTH, dtype=torch.uint8),
            *(numbers(4 * WIDTH, 4 * WIDTH // 64) for _ in range(2)),
            4 * WIDTH,
            64,
            torch.bfloat16,
        ),
    ),
    "flash": ("fp8_flash", lambda m: m.flash(operands(), torch.bfloat16)),
}


class Launched:
    """In the place of a kernel; keeps the grids that it is launched with."""

    def __init__(self, grids: list[tuple[int, ...]], tile: dict[str, int]) -> None:
        self.grids, self.tile = grids, tile

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.grids.append(grid(self.tile) if callable(grid) else grid)
        return lambda *given, **more: None


@pytest.mark.parametrize("name", CALLS)
def test_grids_are_within_the_limits_of_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    module, call = CALLS[name]
    kernels: Any = importlib.import_module(f"geoaccel.kernels.{module}")
    grids: list[tuple[int, ...]] = []
    launched = Launched(grids, {"TILE_N": 64})  # the smallest tile, and so the most programs
    for own, value in list(vars(kernels).items()):
        if isinstance(value, JITFunction | InterpretedFunction) and own.endswith("_kernel"):
            monkeypatch.setattr(kernels, own, launched)
    if hasattr(kernels, "_tuned"):
        monkeypatch.setattr(kernels, "_tuned", lambda: launched)
    call(kernels)
    assert len(grids) == 1
    (first, *others) = grids[0]
    assert 0 < first < 2**31, grids
    assert max(others, default=1) <= 65_535, grids
    assert name != "a few blocks" or first >= BLOCKS
