"""CUDA devices that do not exist: tensors say ``cuda:N`` while their numbers are on the CPU, or are shapes only.

    with SimulatedCuda() as cuda, torch.no_grad():
        model = network.to("cuda:0")
        images = images.to("cuda:0")
        cuda.reset()
        model(images)
        cuda.launches, cuda.waits

Every operation on such a tensor passes through here. Tensors of two devices in one operation are an error, as are what
deterministic algorithms refuse and what reads from another stream without waiting for it. Operations that make the host
wait for the device and operations that launch kernels are counted by the line of the package that caused them, and the
bytes of storages that are alive are added up. Products are in TF32 where the caller allows it.

What is not here: memory inside kernels, the allocator, and how long anything takes. One operation is one launch.
Autograd does not go with tensors of another class: use ``torch.no_grad``, which takes the place of inference mode here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from device_facts import FREE, INDEXED, PRODUCTS, REFUSED, ROUNDED_TO, WAITS
from device_numbers import WrongOnCuda, host_tensor, scaled_mm, tf32
from device_places import Place, running
from device_runtime import Runtime, Stream, allow_cuda_tensors
from device_shapes import each, of_shapes, tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
SDPA = F.scaled_dot_product_attention


class Simulated(Tensor):
    """A tensor that claims to be on a CUDA device; ``inner`` has its numbers, or is a meta tensor."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Simulated:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=device, **shape)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise WrongOnCuda(f"{func} on a simulated tensor outside of SimulatedCuda")

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def record_stream(self, stream: Any) -> None:
        SimulatedCuda.active.recorded.add(self.inner.untyped_storage()._cdata)

    def tolist(self) -> Any:
        return SimulatedCuda.active.answer(self, "tolist")

    def numpy(self, *, force: bool = False) -> Any:
        raise WrongOnCuda("a cuda tensor has no numpy array; .cpu() first")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> Simulated:
        return Simulated(self.inner.clone(), self.device)


class SimulatedCuda(TorchDispatchMode):
    """See the module.

    Args:
        shapes_only: Floating-point tensors have no numbers. Integers and masks that follow from shapes have theirs, and
            where they would follow from numbers, some that are possible.
        kernels: Whether Triton's kernels work: as one launch each, with the numbers of their reference implementations.
        answers: With ``shapes_only``, by "file function", the number (or numbers) that the host asks for there, or a
            function of the tensor.
        capability: Compute capability.
        memory: Bytes of the device.
    """

    active: ClassVar[SimulatedCuda]

    def __init__(
        self,
        *,
        shapes_only: bool = False,
        kernels: bool = True,
        answers: Mapping[str, Any] | None = None,
        capability: tuple[int, int] = (9, 0),
        memory: int = 80 << 30,
    ) -> None:
        super().__init__()
        self.shapes_only, self.answers = shapes_only, dict(answers or {})
        self.runtime = Runtime(self, kernels=kernels, capability=capability, memory=memory)
        self._stream = self.runtime.stream
        self.alive = 0
        self._storages: dict[int, int] = {}  # bytes
        self._written: dict[int, tuple[Stream, int]] = {}
        self._read: dict[int, tuple[Stream, int]] = {}  # by copies that the host does not wait for
        self._pinned: set[int] = set()
        self.recorded: set[int] = set()  # whose memory the allocator gives nobody while another stream reads it
        self._lost: Stream | None = None  # reads what was freed
        self.reset()

    def reset(self) -> None:
        """Forget counts; what is alive stays alive."""
        self.waits: Counter[tuple[Place, str]] = Counter()
        self.launches: Counter[tuple[Place, str]] = Counter()
        self.sdpa: Counter[tuple[int, ...]] = Counter()
        self.peak = self.alive

    def __enter__(self) -> SimulatedCuda:
        allow_cuda_tensors()
        SimulatedCuda.active = self
        self._stack = ExitStack()
        self._stack.enter_context(self.runtime.patched(sdpa=self._sdpa, tensor=host_tensor))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    # -- one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2].rstrip("_")
        tensors = list(tensors_in((args, kwargs)))
        ours = [t for t in tensors if isinstance(t, Simulated)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not ours and (wanted is None or wanted.type != "cuda"):
            pinned = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            if pinned:
                self._pinned.add(out.untyped_storage()._cdata)
                weakref.finalize(out.untyped_storage(), self._freed, out.untyped_storage()._cdata)
            return out
        device = self.runtime.indexed(wanted or ours[0].device)
        self._stream = self.runtime.streams[(device if device.type == "cuda" else ours[0].device).index]
        self._check(name, func, args, kwargs, ours, [t for t in tensors if not isinstance(t, Simulated)])
        self._count_waits(name, args, kwargs, device, tensors)
        if name == "_local_scalar_dense":
            return self.answer(args[0], None)
        if name == "copy" and not isinstance(args[0], Simulated):
            return self._to_host(args[0], args[1])
        out = self._run(func, name, args, kwargs, device)
        if device.type == "cpu":
            return out
        launched = not func.is_view and name not in FREE
        if launched:
            self.launches[running(), name] += 1
        return self._wrapped(out, ours, device, written=launched)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        made = next(tensors_in((args, kwargs)), None) is None
        inner, options = each(lambda t: t.inner if isinstance(t, Simulated) else t, (args, kwargs))
        options.pop("pin_memory", None)
        if name == "cudnn_grid_sampler":  # what torch 2.15 runs on CUDA has neither shapes nor numbers elsewhere
            func, inner = aten.grid_sampler_2d.default, (*inner, 0, 0, True)
        if "device" in options:
            options["device"] = torch.device("cpu")
        if self.shapes_only:
            if device.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return of_shapes(func, name, inner, options, made)
        if name == "_scaled_mm":
            return scaled_mm(*inner, **options)
        if name == "_scaled_dot_product_flash_attention":
            q, k, v = inner[:3]
            out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            none = q.new_empty(0)
            return out, log_sum, none, none, q.shape[2], k.shape[2], none, none, none
        if name in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            inner = each(tf32, inner)
        return func(*inner, **options)

    def _to_host(self, host: Tensor, given: Any) -> Tensor:
        key = host.untyped_storage()._cdata
        if key in self._pinned:
            clock = (self._stream, self._stream.tick())
            self._written[key] = self._read[given.inner.untyped_storage()._cdata] = clock
        if given.inner.is_meta and host.is_floating_point():
            return host  # nothing is written, so that its pages stay unused
        return host.copy_(self._numbers(given))

    def _check(self, name: str, func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor], others: Any) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise WrongOnCuda(f"{running()}: {name} takes a generator of the CPU for a cuda tensor")
        if torch.are_deterministic_algorithms_enabled():
            sums = name in ("cumsum", "cumprod") and args[0].is_floating_point()
            if sums or name in REFUSED or (name == "bincount" and len(args) > 1 and args[1] is not None):
                raise WrongOnCuda(f"{running()}: {name} has no deterministic implementation on CUDA")
        stream = self._stream
        if name in ("_to_copy", "copy"):  # a copy between devices waits for both
            for t in ours:
                stream.wait_stream(self.runtime.streams[t.device.index])
        if self._lost is not None:
            raise WrongOnCuda(f"{running()}: something was freed that {self._lost} still reads")
        keys = [t.inner.untyped_storage()._cdata for t in ours]
        for key in (*keys, *(t.untyped_storage()._cdata for t in others)):
            writer, clock = self._written.get(key, (stream, 0))
            if not stream.has_seen(writer, clock):
                raise WrongOnCuda(f"{running()}: {name} reads from {writer}, which {stream} did not wait for")
        if keys and not isinstance(func, str) and func._schema.is_mutable:
            reader, clock = self._read.get(keys[0], (stream, 0))
            if not stream.has_seen(reader, clock):
                raise WrongOnCuda(f"{running()}: {name} writes what {reader} still reads")
        if name in ("_to_copy", "copy", "lift_fresh"):
            return
        if len({t.device for t in ours}) > 1:
            raise WrongOnCuda(f"{running()}: {func} of {', '.join(sorted({str(t.device) for t in ours}))}")
        if name in INDEXED and isinstance(args[0], Simulated):
            others = [t for t in others if all(t is not index for index in args[1])]
        wrong = [t for t in others if t.ndim or name in PRODUCTS or name in ("cat", "stack")]
        if ours and wrong:
            raise WrongOnCuda(f"{running()}: {func} of {ours[0]} and of {list(wrong[0].shape)} on the CPU")

    def _count_waits(self, name: str, args: Any, kwargs: Any, device: torch.device, tensors: Sequence[Tensor]) -> None:
        for _ in range(WAITS.get(name, 0)):
            self.wait(name)
        if name in ("_to_copy", "copy"):
            there = args[0].device.type if name == "copy" else device.type
            source = args[1] if name == "copy" else args[0]
            if (source.device.type == "cuda") != (there == "cuda"):
                late = kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2])
                host = [t.untyped_storage()._cdata for t in tensors if not isinstance(t, Simulated)]
                if not (late and self._pinned.issuperset(host)):
                    self.wait("copy to the host" if there == "cpu" else "copy from the host")
        if name in INDEXED:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not isinstance(index, Simulated)):
                    self.wait("index by a mask" if index.dtype == torch.bool else "index by numbers on the host")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")

    # -- counting

    def wait(self, what: str) -> None:
        """The host waits for the present stream."""
        self.waits[running(), what] += 1
        self._stream.seen_by_host()

    def answer(self, tensor: Tensor, why: str | None) -> Any:
        """Numbers of a tensor, for the host; ``why`` it waits for them, None where that was counted."""
        if why is not None:
            self.wait(why)
        numbers = tensor.inner  # type: ignore[attr-defined]
        if not numbers.is_meta:
            return numbers.item() if why is None else numbers.tolist()
        place = running()
        for where, value in self.answers.items():
            if f"{place.file} {place.function}".endswith(where):
                return value(tensor) if callable(value) else value
        raise WrongOnCuda(f"{place} asks for numbers of {tensor}, which has none; give answers")

    def launch(self, name: str, make: Callable[..., Any], *inputs: Any) -> Any:
        """Launch a kernel whose output ``make`` gives for the tensors' numbers, or shapes."""
        ours = list(tensors_in(inputs))
        self._stream = self.runtime.streams[next(t for t in ours if isinstance(t, Simulated)).device.index]
        self._check(
            name,
            name,
            inputs,
            {},
            [t for t in ours if isinstance(t, Simulated)],
            [t for t in ours if not isinstance(t, Simulated)],
        )
        inner = each(lambda t: t.inner if isinstance(t, Simulated) else t, inputs)
        with _disable_current_modes():
            if any(t.is_meta for t in tensors_in(inner)):
                inner = each(lambda t: t.to("meta"), inner)
            out = make(*inner)
        self.launches[running(), name] += 1
        return self._wrapped(out, [], ours[0].device, written=True)

    def _wrapped(self, out: Any, ours: Sequence[Any], device: torch.device, *, written: bool) -> Any:
        stream = self._stream
        clock = stream.tick() if written else 0
        same = {id(t.inner): t for t in ours}

        def wrap(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                self._storages[key] = size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, key)
            if written:
                self._written[key] = (stream, clock)
            return same[id(t)] if id(t) in same else Simulated(t, device)

        return each(wrap, out)

    def _freed(self, key: int) -> None:
        self.alive -= self._storages.pop(key, 0)
        self._written.pop(key, None)
        reader, clock = self._read.pop(key, (self._stream, 0))
        if key not in self.recorded and not self.runtime.streams[reader.device_index].has_seen(reader, clock):
            self._lost = reader
        self.recorded.discard(key)
        self._pinned.discard(key)

    def _numbers(self, tensor: Any) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.inner.is_meta else tensor.inner

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if not isinstance(q, Simulated):
            return SDPA(q, k, v, attn_mask, **options)
        masks = (torch.bool, q.dtype)
        if len({q.dtype, k.dtype, v.dtype}) > 1 or (attn_mask is not None and attn_mask.dtype not in masks):
            mask = "none" if attn_mask is None else attn_mask.dtype
            raise WrongOnCuda(f"{running()}: attention of {q.dtype}, {k.dtype} and {v.dtype}, mask {mask}")
        self.sdpa[(*q.shape, k.shape[2])] += 1

        def make(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            # As CUDA's kernels leave it: heads of a token side by side.
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
            return out if q.is_meta else out.copy_(SDPA(q, k, v, mask, **options))

        return self.launch("sdpa", make, q, k, v, attn_mask)
