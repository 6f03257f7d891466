"""A quantization method: a frozen dataclass of knobs that turns a linear layer into a quantized one.

    @register
    @dataclass(frozen=True, kw_only=True)
    class MyMethod(Quantization):
        name: ClassVar[str] = "mymethod"
        layer_type: ClassVar[type[QuantizedLinear]] = MyLinear
        bits: int = 3

        def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]: ...

Layers are selected by name, and recorded in files by name. Knobs are checked on construction.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.knobs import check_knobs
from geoaccel.linears import SHAPERS, QuantizedLinear
from geoaccel.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Stores the weights of linear layers in few bits.

    Attributes:
        name: Registered name.
        layer_type: Type of the layers that it creates.
        uses_gram: Whether codes improve if the second moments of a layer's inputs are known.
        include: Names of the layers to quantize, with ``*`` for any text, dots included; None: the backbone's default
            (:func:`scope_of`), its transformers, also those inside heads.
        exclude: Names of the layers not to quantize; overrides ``include``.
    """

    name: ClassVar[str]
    layer_type: ClassVar[type[QuantizedLinear]]
    uses_gram: ClassVar[bool] = False
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_knobs(self, self.name)
        for knob in ("include", "exclude"):
            given = getattr(self, knob)
            if given is None and knob == "include":
                continue
            patterns = (given,) if isinstance(given, str) else given
            if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
                raise UserError(f"{self.name}: {knob}={given!r} must be a list of names such as 'aggregator.*'")
            object.__setattr__(self, knob, patterns)

    def __str__(self) -> str:
        """The name, and the knobs that are not at their defaults."""
        entries = dataclasses.fields(self)
        changed = [f"{e.name}={getattr(self, e.name)!r}" for e in entries if getattr(self, e.name) != e.default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def layer(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """A layer with empty buffers.

        Raises:
            ValueError: If the method does not support this shape.
        """
        return self.layer_type(self, in_features, out_features, bias=bias, device=device)

    def encode(
        self,
        weight: Tensor,  # [out, in] float32
        gram: Tensor | None = None,  # [in, in]
    ) -> dict[str, Tensor]:
        """Codes and scales of a layer, by the name of the buffer.

        Args:
            weight: Weight of the float layer.
            gram: Second moments of its inputs, for methods that use them.
        """
        raise NotImplementedError

    def quantize(self, linear: nn.Linear, name: str = "linear", gram: Tensor | None = None) -> QuantizedLinear:
        """The quantized layer of a linear one.

        Args:
            linear: The layer.
            name: Its name, for errors.
            gram: [in, in], see :meth:`encode`.

        Raises:
            ValueError: If a weight is NaN or infinite, or the shape does not fit the method.
        """
        weight = linear.weight.detach()
        if not torch.isfinite(weight.sum(dtype=torch.float64)):
            raise UserError(f"{self.name}: the weights of {name} contain NaN or infinite values; repair the checkpoint")
        layer = self.layer(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        for key, value in self.encode(weight.float(), gram).items():
            setattr(layer, key, value)
        if linear.bias is not None:
            layer.bias = linear.bias.detach()
        return layer.train(linear.training)

    def round_trip(
        self,
        weight: Tensor,  # [out, in] float32
    ) -> Tensor:  # [out, in] float32
        """These weights, quantized and dequantized."""
        layer = self.layer(weight.shape[1], weight.shape[0], bias=False, device="meta")
        for key, value in self.encode(weight).items():
            setattr(layer, key, value)
        return layer.dequantize()

    def select(self, linears: Mapping[str, nn.Linear], scope: Sequence[str]) -> list[str]:
        """Names of the layers that the method quantizes, in order.

        Args:
            linears: All float linear layers of a network by name.
            scope: Default patterns for this network if ``include`` is None, see :func:`scope_of`.

        Raises:
            ValueError: If a pattern matches nothing, or nothing is left.
        """
        include = scope if self.include is None else self.include
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise UserError(f"{self.name}: {pattern!r} matches no linear layer; {_what_there_is(pattern, linears)}")
        taken = [
            name
            for name in linears
            if any(fnmatchcase(name, pattern) for pattern in include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        ]
        if not taken:
            raise UserError(
                f"{self.name}: include={list(include)} with exclude={list(self.exclude)} leaves no linear layer; "
                f"{_what_there_is(include[0] if include else '', linears)}"
            )
        return taken


def scope_of(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the layers quantized by default: the backbone's, or all layers of another network."""
    backbone = getattr(model, "backbone", None)
    return backbone.quantizable if isinstance(backbone, Backbone) else ("*",)


def _what_there_is(pattern: str, linears: Mapping[str, nn.Linear]) -> str:
    """One line on the layers of a network, with a suggestion."""
    if not linears:
        return "the network has none that is not quantized already"
    places = dict.fromkeys(name.partition(".")[0] for name in linears)
    guess = difflib.get_close_matches(pattern.partition(".")[0], places, n=1)
    hint = f". Did you mean {pattern.replace(pattern.partition('.')[0], guess[0], 1)!r}?" if guess else ""
    return f"the network has {len(linears)}, under {', '.join(places)}, the first is {next(iter(linears))}{hint}"


Method = TypeVar("Method", bound=type)

QUANTIZATION: Registry[Callable[..., Quantization]] = Registry("quantization method", group="quantization")


def register(method: Method) -> Method:
    """Register a method under its name, for users and checkpoints; a class decorator."""
    name = method.name  # type: ignore[attr-defined]
    QUANTIZATION.register(name, method)
    SHAPERS.register(name, _shape)
    return method


def _shape(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Replace the layers named in a file's record by empty quantized ones."""
    constructor = QUANTIZATION[record["name"]]
    known = {entry.name for entry in dataclasses.fields(constructor)}  # type: ignore[arg-type]
    strange = [knob for knob in record["knobs"] if knob not in known]
    if strange:
        raise UserError(f"{record['name']} has no knob {strange[0]!r} in this version; known: {', '.join(known)}")
    method = constructor(**record["knobs"])
    for name in record["linears"]:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{name} is a {type(linear).__name__}, expected a linear layer")
        bias = linear.bias is not None
        model.set_submodule(name, method.layer(linear.in_features, linear.out_features, bias=bias, device="meta"))
