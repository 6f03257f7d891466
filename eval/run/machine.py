"""What a measurement was made on."""

from __future__ import annotations

import platform

import torch

import geoaccel
from geoaccel.errors import UserError
from geoaccel.registry import unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_dtype(name: str, device: str) -> str:
    """Resolve ``auto``: bfloat16 on CUDA, float32 on a CPU.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in DTYPES:
        raise UserError(unknown("dtype", name, list(DTYPES)))
    if name != "auto":
        return name
    return "bfloat16" if device.startswith("cuda") else "float32"


def hardware(device: str) -> str:
    """What it ran on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def versions() -> dict[str, str]:
    """Of everything that changes a number."""
    return {"geoaccel": geoaccel.__version__, "torch": torch.__version__, "python": platform.python_version()}
