"""Where a model runs, in which type, and what a measurement was made on."""

from __future__ import annotations

import platform
import re

import torch

from geoaccel.errors import UserError
from geoaccel.registry import unknown
from geoaccel.version import __version__

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str) -> str:
    """Resolve ``auto`` and refuse what is not there.

    Raises:
        ValueError: For an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise UserError(f"device {name} is not available here; use --device cpu")
    if torch.device(name).index is not None and torch.device(name).index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name} is not available here; the last one is cuda:{last}")
    return name


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
    return {"geoaccel": __version__, "torch": torch.__version__, "python": platform.python_version()}
