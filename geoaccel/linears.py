"""Quantized linear layers: the second seam, what replaces a linear layer, and how files record it.

:mod:`geoaccel.attention` is the first seam. This one is also below methods and backbones, because both need it:
quantization creates the layers, and code that builds, casts, loads or saves a network has to know them.

Quantization methods create these layers; checkpoints know them only through this module. The metadata of a file with
quantized layers records under ``quantization`` which method made which layers:

    [{"name": "w4a16", "knobs": {"group_size": 128, ...}, "linears": ["aggregator.frame_blocks.0.attn.qkv", ...]}]
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.registry import Registry


class QuantizedLinear(nn.Module):
    """A linear layer with low-bit weights in plain buffers. For inference: nothing in it is trained.

    Args:
        method: The frozen dataclass of knobs that made it; its class has a ``name``.
        in_features, out_features: Those of the float layer.
        bias: Whether there is one.
        device: Device of the buffers, which are not initialised.

    Attributes:
        stored: Names of the buffers that hold the weights, in the order of :meth:`buffer_shapes`. They keep their dtype
            when the network is cast; the bias follows the network.
        original: The float layer, if it is kept; hidden from parameters and state dict.
    """

    stored: ClassVar[tuple[str, ...]]
    bias: Tensor | None

    def __init__(
        self,
        method: Any,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.in_features = in_features
        self.out_features = out_features
        # In a tuple, because a module would be registered.
        self.original: tuple[nn.Linear, ...] = ()
        self._dtype = torch.float32
        for name, (shape, dtype) in zip(self.stored, self.buffer_shapes(), strict=True):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def buffer_shapes(self) -> Sequence[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer in ``stored``."""
        raise NotImplementedError

    def keep(self, linear: nn.Linear) -> None:
        """Keep the float layer in its present state."""
        self.original, self._dtype = (linear,), linear.weight.dtype

    def unquantized(self) -> nn.Linear:
        """The kept float layer, on the present device and in the present dtype of the network."""
        linear, device = self.original[0], next(self.buffers()).device
        if (linear.weight.device, linear.weight.dtype) != (device, self._dtype):
            linear = copy.deepcopy(linear).to(device, self._dtype)  # its tensors may be shared
        return linear.train(self.training)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [out, in]
        """The dequantized weights."""
        raise NotImplementedError

    def takes_gelu(self, x: Tensor) -> bool:
        """Whether ``forward(x, gelu=True)`` applies a fused GELU to its input."""
        return False

    @property
    def weight(self) -> Tensor:  # [out, in]
        """The dequantized weights in the dtype of the network, recomputed on every access."""
        return self.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    @property
    def runs_as(self) -> str:
        """How the product is computed on the present device."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes and their scales."""
        return sum(getattr(self, name).nbytes for name in self.stored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Casting a network visits all floating-point buffers, e4m3 included.
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            sample = fn(buffer.new_empty(0))
            casts = name in self.stored and sample.dtype != buffer.dtype
            self._buffers[name] = buffer.to(sample.device) if casts else fn(buffer)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``nn.Linear`` would compute in: autocast's if it is on, else that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


Shaper = Callable[[nn.Module, Mapping[str, Any]], None]
SHAPERS: Registry[Shaper] = Registry("quantization method", group="quantization")
"""By method: replaces the float layers of a network on the meta device by empty quantized ones, from a record."""


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name of every buffer that holds quantized weights, and its dtype, which never changes."""
    return {
        f"{name}.{key}": getattr(layer, key).dtype
        for name, layer in quantized_linears(model).items()
        for key in layer.stored
    }


def records(model: nn.Module) -> list[dict[str, Any]]:
    """Records for a file's metadata: which method made which layers, and further entries of modules."""
    groups: dict[Any, list[str]] = {}
    for name, layer in quantized_linears(model).items():
        groups.setdefault(layer.method, []).append(name)
    made = [
        {"name": method.name, "knobs": dataclasses.asdict(method), "linears": names} for method, names in groups.items()
    ]
    notes: list[Any] = [m.quantization_record for m in model.modules() if hasattr(m, "quantization_record")]
    return made + notes


def shape_from_records(model: nn.Module, text: str, what: str) -> None:
    """Give a network on the meta device the quantized layers that a file describes.

    Args:
        model: On the meta device.
        text: JSON of :func:`records`.
        what: The file, for messages.

    Raises:
        ValueError: If the records are damaged, or name a method or a layer that does not exist.
    """
    try:
        for record in json.loads(text):
            SHAPERS[record["name"]](model, record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{what} has damaged records of its quantized layers: {reason}; export it again") from error
