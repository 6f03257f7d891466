"""Estimates the memory that a forward needs before it starts, and refuses one that cannot fit."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn

from geoaccel.errors import UserError

GIB = 2**30
# Kernels, allocator and libraries take some on top of what the formulas count.
HEADROOM = 1.15
PIXEL_BYTES = 5
"""Of a colour of a pixel while images are read: as they were decoded, and in float32."""


class _Sized(Protocol):
    def activation_bytes(self, frames: int, size: tuple[int, int]) -> int: ...


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still get on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return int(psutil.virtual_memory().available)


def estimate_bytes(model: nn.Module, *, frames: int, size: tuple[int, int]) -> int:
    """Memory that a forward over S frames of H x W needs beyond what is in use now.

    On a CPU this counts weights that are still in the checkpoint file: they are mapped, and read when first used; of a
    network on the meta device all of them.
    """
    needed = HEADROOM * cast(_Sized, model).activation_bytes(frames, size)
    tensor: Any = next(model.parameters())
    if tensor.device.type in ("cpu", "meta"):
        import psutil

        weights = sum(parameter.nbytes for parameter in model.parameters())
        needed += max(0, weights - (psutil.Process().memory_info().rss if tensor.device.type == "cpu" else 0))
    return round(needed)


def check_memory(model: nn.Module, *, frames: int, size: tuple[int, int], unread: bool = False) -> None:
    """Refuse a forward that cannot fit.

    Args:
        model: Where its weights are is where it runs.
        frames: S.
        size: (H, W).
        unread: The images are not in memory yet.

    Raises:
        ValueError: With the memory needed and free, and how many frames would fit.
    """
    device = next(model.parameters()).device
    pixels = PIXEL_BYTES * 3 * size[0] * size[1] if unread and device.type == "cpu" else 0

    def needed_for(count: int) -> int:
        return estimate_bytes(model, frames=count, size=size) + count * pixels

    needed, free = needed_for(frames), free_bytes(device)
    if needed <= free:
        return
    fitting = max((n for n in range(1, frames) if needed_for(n) <= free), default=0)
    advice = f"at most {fitting} frames fit (--max-frames {fitting})" if fitting >= 2 else "use a smaller model"
    narrow = "" if next(model.parameters()).dtype == torch.bfloat16 else ", or halve it with --dtype bfloat16"
    raise UserError(
        f"{frames} frames of {size[0]} x {size[1]} pixels need about {needed / GIB:.1f} GiB on {device.type}, "
        f"{free / GIB:.1f} GiB are free; {advice}{narrow}"
    )
