"""Choice of device and dtype, and the hardware and versions that a measurement was made on."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import UserError
from geoaccel.fingerprint import of_networks
from geoaccel.registry import unknown
from geoaccel.version import __version__

MIN_REPEATS = 5  # the median of fewer runs says little
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


@lru_cache
def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """The machine of a measurement, as plain data; ``instructions`` of the CPU are the widest that torch uses."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }


def hardware(device: str) -> str:
    """The hardware, in words."""
    return in_words(machine(device))


def in_words(found: Mapping[str, Any]) -> str:
    """The record of :func:`machine`, in words."""
    if found["device"] != "cpu":
        return str(found["device"])
    return f"{found['threads']} CPU threads, {found['processor']} ({found['instructions']})"


def versions() -> dict[str, str]:
    """Of everything that changes a number; ``code`` is a fingerprint of the networks and methods."""
    return {
        "geoaccel": __version__,
        "code": of_networks(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
