"""What a measurement was made on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import geoaccel
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_networks
from geoaccel.registry import unknown

MIN_REPEATS = 5  # the median of fewer runs says little
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
    """What a measurement depends on, as plain data; ``instructions`` of the CPU are the widest that torch uses."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }


def hardware(device: str) -> str:
    """What it ran on, in words."""
    return in_words(machine(device))


def in_words(found: Mapping[str, Any]) -> str:
    """What :func:`machine` found."""
    if found["device"] != "cpu":
        return str(found["device"])
    return f"{found['threads']} CPU threads, {found['processor']} ({found['instructions']})"


def versions() -> dict[str, str]:
    """Of everything that changes a number; ``code`` is a fingerprint of the networks and methods."""
    return {
        "geoaccel": geoaccel.__version__,
        "code": of_networks(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
