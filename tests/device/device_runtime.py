"""What ``torch.cuda`` says on simulated devices: which there are, their streams, and kernels in Triton's place."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # otherwise imported in the middle of an operation, where CUDA seems to be there
import torch.nn.functional as F
import torch.utils._device
from device_shapes import tensors_in
from torch import Tensor

import geoaccel.kept as kept
from geoaccel.kernels import choice, e4m3, fp8, fp8_reference, fused, twins
from geoaccel.merging import key_subset
from geoaccel.quantization.formats import fp8 as fp8_linears

DEVICES = 2
TO = Tensor.to
REGISTRY, CUDA, META = "_ZN3c104impl26device_guard_impl_registryE", 1, 14


@functools.cache
def allow_cuda_tensors() -> None:
    """Give a build of torch without CUDA a device guard for it: the one of meta tensors, which does nothing.

    Python's bindings set the device before they run an operation.
    """
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), REGISTRY)
    guards[CUDA] = guards[CUDA] or guards[META]


def why_not() -> str | None:
    """Why devices cannot be simulated here; None where they can."""
    if torch.cuda.is_available():
        return "this machine has a CUDA device; run with --gpu"
    try:
        allow_cuda_tensors()
    except (OSError, StopIteration, ValueError, AttributeError) as error:
        return f"this build of torch keeps its device guards elsewhere: {error}"
    return None


class Stream:
    """Operations in their order, and what of other streams has been waited for."""

    streams = 0

    def __init__(self, device: Any = None, runtime: Runtime | None = None, **_: Any) -> None:
        self.device_index = 0 if device is None else torch.device(device).index or 0
        self.runtime = runtime
        self.clock, self.seen = 0, {}  # type: int, dict[Stream, int]
        self.host_seen = 0
        Stream.streams += 1
        self.cuda_stream = self.number = Stream.streams

    def tick(self) -> int:
        """One operation more; its place in the order."""
        self.clock += 1
        return self.clock

    def has_seen(self, other: Stream, clock: int) -> bool:
        """Whether an operation of another stream ends before the next one of this begins."""
        return other is self or max(other.host_seen, self.seen.get(other, 0)) >= clock

    def seen_by_host(self) -> None:
        """The host has waited for everything, and with it every stream."""
        self.host_seen = self.clock

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, clock in event.seen.items():
            self.seen[stream] = max(clock, self.seen.get(stream, 0))

    def synchronize(self) -> None:
        self.seen_by_host()

    def __repr__(self) -> str:
        return f"stream {self.number}"


class Event:
    """What a stream had done, and seen of others, at one time."""

    def __init__(self, **_: Any) -> None:
        self.seen: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or torch.cuda.current_stream()  # type: ignore[assignment]
        assert isinstance(stream, Stream)
        self.seen = {**stream.seen, stream: stream.clock}

    def wait(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)  # type: ignore[arg-type]

    def synchronize(self) -> None:
        for stream, clock in self.seen.items():
            stream.host_seen = max(stream.host_seen, clock)


class Runtime:
    """The state of all devices.

    Args:
        cuda: Whose.
        kernels: Whether Triton is there.
        capability: Compute capability.
        memory: Bytes.
    """

    def __init__(self, cuda: Any, *, kernels: bool, capability: tuple[int, int], memory: int) -> None:
        self.cuda, self.kernels, self.capability, self.memory = cuda, kernels, capability, memory
        self.current = 0
        self.streams = [Stream(torch.device("cuda", index)) for index in range(DEVICES)]

    @property
    def stream(self) -> Stream:
        """Of the current device."""
        return self.streams[self.current]

    def indexed(self, device: torch.device) -> torch.device:
        """A device with its number."""
        return torch.device("cuda", self.current) if device.type == "cuda" and device.index is None else device

    @contextmanager
    def on(self, device: Any) -> Iterator[None]:
        """Another current device."""
        before, self.current = self.current, self._index(device)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """Another current stream of its device."""
        before = self.streams[stream.device_index]
        self.streams[stream.device_index] = stream
        try:
            yield
        finally:
            self.streams[stream.device_index] = before

    def _index(self, device: Any) -> int:
        if device is None or isinstance(device, int):
            return self.current if device is None else device
        return self.indexed(torch.device(device)).index

    @contextmanager
    def patched(self, *, sdpa: Callable[..., Tensor], tensor: Callable[..., Tensor]) -> Iterator[None]:
        """Let torch and the package believe in the devices."""
        forget()
        torch.utils._device._device_constructors()  # it keeps the functions that it finds: the real ones
        with ExitStack() as stack:

            def put(target: Any, **names: Any) -> None:
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(target, name, value, create=True))

            put(torch, tensor=tensor)
            put(Tensor, to=lambda tensor, *args, **kwargs: self._to(tensor, *args, **kwargs))
            put(torch.inference_mode, __enter__=_without_gradients, __exit__=_with_gradients)
            put(F, scaled_dot_product_attention=sdpa)
            put(torch.cuda, **self._functions())
            if self.kernels:
                stack.enter_context(_imported(self._kernels()))
            if self.cuda.shapes_only:  # without numbers nothing can be tried
                why = None if self.kernels else "triton is not installed"
                tried = functools.cache(lambda *given: why)
                put(choice, why_not=tried)
                put(fused, _try=tried)
                put(fp8, _try_kernel=tried)
                put(fp8_linears, _try_product=tried)
            find = importlib.util.find_spec
            found = types.ModuleType("triton") if self.kernels else None
            put(importlib.util, find_spec=lambda name, *rest: found if name == "triton" else find(name, *rest))
            overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
            lift = torch._C._only_lift_cpu_tensors()
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            torch._C._set_only_lift_cpu_tensors(True)
            try:
                yield
            finally:
                torch._C._set_only_lift_cpu_tensors(lift)
                torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
                forget()

    def _functions(self) -> dict[str, Any]:
        major, minor = self.capability
        properties = types.SimpleNamespace(
            name="simulated", total_memory=self.memory, major=major, minor=minor, multi_processor_count=132
        )
        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: DEVICES,
            "current_device": lambda: self.current,
            "device": self.on,
            "set_device": lambda device: setattr(self, "current", self._index(device)),
            "Stream": functools.partial(Stream, runtime=self),
            "Event": Event,
            "stream": self.using,
            "current_stream": lambda device=None: self.streams[self._index(device)],
            "default_stream": lambda device=None: self.streams[self._index(device)],
            "is_current_stream_capturing": lambda: False,
            "synchronize": self._synchronize,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "simulated",
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda *args, **options: True,
            "memory_reserved": lambda device=None: self.cuda.alive,
            "memory_allocated": lambda device=None: self.cuda.alive,
            "max_memory_allocated": lambda device=None: self.cuda.peak,
            "reset_peak_memory_stats": lambda device=None: setattr(self.cuda, "peak", self.cuda.alive),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (self.memory - self.cuda.alive, self.memory),
        }

    def _synchronize(self, device: Any = None) -> None:
        self.cuda.wait("synchronize")
        self.streams[self._index(device)].seen_by_host()

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, which asks the guard for the number of a device without one."""
        args = tuple(self.indexed(torch.device(a)) if isinstance(a, str | torch.device) else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = self.indexed(torch.device(kwargs["device"]))
        return TO(tensor, *args, **kwargs)

    def _kernels(self) -> dict[str, types.ModuleType]:
        """Modules that launch the reference implementations as one kernel each."""

        def module(name: str, **functions: Callable[..., Any]) -> types.ModuleType:
            made = types.ModuleType(f"geoaccel.kernels.{name}")
            for called, make in functions.items():
                setattr(made, called, self._launcher(called, make))
            return made

        made = [
            module("match", best_match=_best_match, segment_mean=_segment_mean),
            module("nibbles", decode_groups=_decode_groups),
            module("fp8_flash", flash=_flash),
        ]
        for path in sorted({path for path, _ in fused.NAMES.values()}):
            names = [name for name, (where, _) in fused.NAMES.items() if where == path]
            made.append(module(path.rpartition(".")[2], **{name: getattr(twins, name) for name in names}))
        return {m.__name__: m for m in made}

    def _launcher(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*inputs: Any, **options: Any) -> Any:
            tensors = tensors_in(list(map(_parts, inputs)))
            wrong = [t.device for t in tensors if t.device != torch.device("cuda", self.current)]
            if wrong:
                raise RuntimeError(f"Triton launches {name} on cuda:{self.current} with a tensor on {wrong[0]}")
            return self.cuda.launch(name, functools.partial(make, **options), *map(_parts, inputs))

        return launch


@contextmanager
def _imported(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """In the place of the real ones. What else is imported meanwhile stays, as it does not import twice."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def forget() -> None:
    """Nothing is known of devices, and nothing kept on them."""
    kept.forget()
    key_subset.forget()
    for tried in (choice.why_not, fused._try, fp8._try_kernel, fp8_linears._try_product):
        tried.cache_clear()


def _without_gradients(mode: Any) -> None:
    """Inference mode does not go with tensors of another class."""
    mode.instead = torch.no_grad() if mode.mode else nullcontext()
    mode.instead.__enter__()


def _with_gradients(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


def _parts(given: Any) -> Any:
    """Tensors of operands, which are a dataclass."""
    return list(vars(given).values()) if isinstance(given, fp8_reference.Operands) else given


def _best_match(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if source.is_meta:
        return source.new_empty(source.shape[:2], dtype=torch.float32), torch.zeros(source.shape[:2], dtype=torch.int64)
    return tuple((source.float() @ target.float().transpose(1, 2)).max(-1))  # type: ignore[return-value]


def _segment_mean(x: Tensor, members: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    if x.is_meta:
        return x.new_empty(len(starts), x.shape[1])
    return F.embedding_bag(members, x.float(), starts, mode="mean").to(x.dtype)


def _decode_groups(packed: Tensor, scale: Tensor, zero: Tensor, inputs: int, size: int, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :inputs]
    steps, starts = (t.float().repeat_interleave(size, dim=1)[:, :inputs] for t in (scale, zero))
    return (codes.float() * steps + starts).to(dtype)


def _flash(operands: list[Any], dtype: torch.dtype, native: bool = True) -> Tensor:
    if operands[0].is_meta:
        return operands[0].new_empty(operands[0].shape, dtype=dtype)
    assert all(t.dtype == e4m3.E4M3 for t in operands[::2][:3])
    return fp8_reference.emulate(fp8_reference.Operands(*operands)).to(dtype)
