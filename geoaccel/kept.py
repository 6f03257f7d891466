"""Cache of tensors that depend only on a layout, kept on their device for later forwards, of bounded size.

    @kept
    def tables(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]: ...

Entries belong to one stream of the device: another stream could read them before they have been written. Nothing is
cached during compilation or graph capture, nor are fake tensors.
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
"""Total size of the cache; least recently used entries go first."""

P = ParamSpec("P")
T = TypeVar("T")

_values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
_lock = Lock()


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Cache the results of a function of hashable arguments, one of which is a device.

    Its tensors are shared and must not be written to.
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
        with torch.inference_mode(False), torch.no_grad():  # cached tensors must work in training, too
            value = make(*args, **kwargs)
        tensors = list(_tensors(value))
        if not any(tensor.is_meta for tensor in tensors):
            _keep(key, value, sum(tensor.nbytes for tensor in tensors))
        return value

    return get


def forget() -> None:
    """Clear the cache."""
    with _lock:
        _values.clear()


def kept_bytes() -> int:
    """Size of the cache in bytes."""
    with _lock:
        return sum(size for _, size in _values.values())


def _without_numbers() -> bool:
    """Whether tensors created now are fake ones, which cannot be mixed with real ones."""
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
    """Identifies the current stream of a device."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
