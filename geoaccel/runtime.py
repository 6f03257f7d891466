"""Choice of device and dtype, and the hardware and versions that a measurement was made on."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from geoaccel import bfloat16
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_networks
from geoaccel.measured import SWITCH, built_in_only
from geoaccel.registry import unknown
from geoaccel.version import __version__

MIN_REPEATS = 5  # the median of fewer runs says little
NO_MPS = "Apple GPUs lack float64, which cameras and token positions need; nothing was tested on one"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str | torch.device) -> str:
    """Resolve ``auto`` and refuse devices that are missing or untested.

    Raises:
        ValueError: For an unknown name, or a device that this machine does not have.
    """
    if isinstance(name, torch.device):
        name = name.type if name.type == "cpu" else str(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"mps(:\d+)?", str(name)):
        raise UserError(f"device {name} is not supported ({NO_MPS}); use --device cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise UserError(f"device {name} is not available here; use --device cpu (device=cpu in settings)")
    if torch.device(name).index is not None and torch.device(name).index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name} is not available here; the last one is cuda:{last}")
    return name


def pick_dtype(name: str, device: str, *, ask_processor: bool = True) -> str:
    """Resolve ``auto``, as :func:`auto_dtype` does.

    Args:
        name: Name of a type, or ``auto``.
        device: Where the model will run.
        ask_processor: On a CPU let a measurement decide. False gives float32, so that figures of different machines
            can be compared.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in DTYPES:
        raise UserError(unknown("dtype", name, list(DTYPES)))
    if name != "auto":
        return name
    return auto_dtype(device)[0] if ask_processor or device != "cpu" else "float32"


def auto_dtype(device: str, *, ask: bool = True) -> tuple[str, str]:
    """The dtype for ``auto`` on a device, and why.

    On CUDA bfloat16 from compute capability 8.0 on, float16 below, where bfloat16 has no matrix units. On a CPU
    bfloat16 if it was measured to be faster on this processor, else float32.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        ask: Measure the processor if that has not been done yet: about a second, once.
    """
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return "bfloat16", "for a CUDA device that is not available here"
        major, minor = torch.cuda.get_device_capability(device)
        has = f"compute capability {major}.{minor}"
        return ("bfloat16", has) if major >= 8 else ("float16", f"{has}; bfloat16 is for 8.0 and later")
    if built_in_only():
        return "float32", f"not measured, {SWITCH}=built-in"
    gain = bfloat16.gain(machine("cpu"), ask=ask)
    if gain is None:
        return "float32", "bfloat16 was not measured on this processor yet"
    why = f"bfloat16 takes {1 / gain:.2f} times as long as float32 on this processor, measured"
    return ("bfloat16" if gain >= bfloat16.LEAST_GAIN else "float32"), why


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
    """The machine of a measurement, as plain data; ``instructions`` are the widest of the CPU that torch uses."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }


def hardware(device: str) -> str:
    """The hardware as text."""
    return in_words(machine(device))


def in_words(found: Mapping[str, Any]) -> str:
    """The record of :func:`machine` as text."""
    if found["device"] != "cpu":
        return str(found["device"])
    return f"{found['threads']} CPU threads, {found['processor']} ({found['instructions']})"


def versions() -> dict[str, str]:
    """Versions of everything that affects results; ``code`` is a fingerprint of the networks and methods."""
    return {
        "geoaccel": __version__,
        "code": of_networks(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
