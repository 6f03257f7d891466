"""Tensors that depend on a layout alone, kept on their device for the forwards that follow, within a bound.

    @kept
    def tables(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]: ...

What is kept belongs to one stream of the device: another stream could read it before it has been written. Nothing is
kept of what is being compiled or captured, nor of tensors without numbers of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

LIMIT_BYTES = 128 << 20
"""Of everything that is kept; what was used longest ago goes first."""

P = ParamSpec("P")
T = TypeVar("T")

_values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
_lock = Lock()


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function makes of hashable arguments, one of which is a device.

    Its tensors must not be written to: others read them.
    """

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        devices = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        if torch.compiler.is_compiling() or _capturing(devices) or _without_numbers():
            return make(*args, **kwargs)
        key = (make, args, tuple(sorted(kwargs.items())), *map(_stream, devices))
        with _lock:
            if key in _values:
                _values.move_to_end(key)
                return _values[key][0]
        with torch.inference_mode(False), torch.no_grad():  # kept tensors must serve training, too
            value = make(*args, **kwargs)
        tensors = list(_tensors(value))
        if not any(tensor.is_meta for tensor in tensors):
            _keep(key, value, sum(tensor.nbytes for tensor in tensors))
        return value

    return get


def forget() -> None:
    """Let go of everything that is kept."""
    with _lock:
        _values.clear()


def kept_bytes() -> int:
    """Bytes of everything that is kept."""
    with _lock:
        return sum(size for _, size in _values.values())


def _without_numbers() -> bool:
    """Whether tensors that are made now are fakes, beside which none with numbers may stand."""
    return torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode() is not None


def _keep(key: Hashable, value: Any, size: int) -> None:
    with _lock:
        _values[key] = (value, size)
        total = sum(size for _, size in _values.values())
        while total > LIMIT_BYTES:
            total -= _values.popitem(last=False)[1][1]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _capturing(devices: list[torch.device]) -> bool:
    return any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> Hashable:
    """What tells the present stream of a device from its others."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
