"""Quantized checkpoint files: checks before writing, and a summary afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from geoaccel.errors import UserError
from geoaccel.linears import stored_dtypes
from geoaccel.quantization.swap import QuantizedPart

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantizedFile:
    """A checkpoint that was written.

    Attributes:
        path: The file; ``load_model`` reads it.
        file_bytes: Its size.
        numbers: Weights, biases and all other numbers of the network, quantized or not.
        parts: What each method holds.
    """

    path: Path
    file_bytes: int
    numbers: int
    parts: tuple[QuantizedPart, ...]

    def __str__(self) -> str:
        listing = "; ".join(f"{part.linears} linear layers as {part.method}" for part in self.parts)
        references = " and ".join(
            f"{width * self.numbers / 1e6:,.1f} MB in {dtype} ({width * self.numbers / self.file_bytes:.2f}x)"
            for dtype, width in (("bfloat16", 2), ("float32", 4))
        )
        return f"{self.path}: {self.file_bytes / 1e6:,.1f} MB ({listing}); all of it takes {references}"


def check_range(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to write NaN, infinity, or numbers beyond the range of a narrow type.

    Raises:
        ValueError: Naming the tensor.
    """
    stored = stored_dtypes(network)
    for name, tensor in network.state_dict().items():
        largest = float(tensor.abs().max()) if name not in stored and tensor.numel() else 0.0
        if not math.isfinite(largest):
            raise UserError(f"{name} contains NaN or infinite values; repair the checkpoint")
        if largest > torch.finfo(dtype).max:
            raise UserError(f"{name} contains {largest:.3g}, out of range for {dtype}; use --dtype bfloat16 or float32")
