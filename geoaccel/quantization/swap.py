"""Replaces linear layers of a network by quantized ones, and restores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from geoaccel.errors import UserError
from geoaccel.linears import QuantizedLinear, quantized_linears
from geoaccel.quantization.method import Quantization, scope_of


def float_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The float linear layers of a network by name, including those kept by quantized ones."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.original:
            found[name] = module.unquantized()
        elif isinstance(module, nn.Linear):
            found[name] = module
    return found


def methods_in(model: nn.Module) -> list[Quantization]:
    """The methods that made the quantized layers of a network, each once."""
    return list(dict.fromkeys(layer.method for layer in quantized_linears(model).values()))


def has_floats(model: nn.Module) -> bool:
    """Whether the float weights of all linear layers exist, possibly kept by quantized ones."""
    return all(layer.original for layer in quantized_linears(model).values())


def check_replaceable(model: nn.Module, otherwise: str = "leave out quantization") -> None:
    """Refuse a network without its float layers.

    Args:
        model: Any network of linear layers.
        otherwise: What the caller may do instead.

    Raises:
        ValueError: If any quantized layer has not kept its original.
    """
    if not has_floats(model):
        layers = quantized_linears(model)
        names = ", ".join(map(str, methods_in(model)))
        raise UserError(
            f"the float weights of {len(layers)} linear layers were not kept ({names}); load the float checkpoint "
            f"again and keep them with accelerate(..., keep_original=True); or {otherwise}"
        )


def owners(
    linears: Mapping[str, nn.Linear], methods: Sequence[Quantization], scope: Sequence[str]
) -> dict[str, Quantization]:
    """The layers of each method.

    Args:
        linears: The float linear layers of a network by name.
        methods: Methods for different layers.
        scope: Default layers, see :func:`geoaccel.quantization.method.scope_of`.

    Raises:
        ValueError: If two methods take the same layer, or one matches none.
    """
    owner: dict[str, Quantization] = {}
    for method in methods:
        for name in method.select(linears, scope):
            if name in owner:
                raise UserError(
                    f"{owner[name].name} and {method.name} both quantize {name}; exclude it from one of them"
                )
            owner[name] = method
    return owner


def quantized_layers(
    model: nn.Module, methods: Sequence[Quantization], *, keep_original: bool = False
) -> dict[str, QuantizedLinear]:
    """The quantized layers of a network by name. The network is not changed.

    Raises:
        ValueError: If two methods take the same layer, or one cannot work on this network.
    """
    linears = float_linears(model)
    owner = owners(linears, methods, scope_of(model))
    layers = {}
    for name, method in owner.items():
        layers[name] = method.quantize(linears[name], name)
        if keep_original:
            layers[name].keep(linears[name])
    return layers


def restore_linears(model: nn.Module) -> None:
    """Restore the kept float layers, on the present device and in the present dtype of the network.

    Raises:
        ValueError: If any was not kept.
    """
    check_replaceable(model)
    for name, layer in quantized_linears(model).items():
        model.set_submodule(name, layer.unquantized())


def prepare(model: nn.Module, methods: Sequence[Quantization], *, keep_original: bool = False) -> Callable[[], None]:
    """Do everything that can fail without changing the network; calling the result replaces the layers.

    Layers of an earlier call are replaced, by the float layers if there are no methods. A network without its float
    layers stays quantized.

    Raises:
        ValueError: If it would have to be quantized again, two methods take the same layer, or one cannot work on this
            network.
    """
    if not has_floats(model) and (not methods or (not keep_original and set(methods) == set(methods_in(model)))):
        return lambda: None
    check_replaceable(model)
    layers = quantized_layers(model, methods, keep_original=keep_original)

    def commit() -> None:
        restore_linears(model)
        for name, layer in layers.items():
            model.set_submodule(name, layer)

    return commit


def quantize(model: nn.Module, *methods: Quantization, keep_original: bool = False) -> nn.Module:
    """Replace linear layers by quantized ones, in place.

    Args:
        model: Any network of linear layers.
        methods: Each takes layers of its own.
        keep_original: Keep the float layers too, for :func:`restore_linears`.

    Raises:
        ValueError: As :func:`prepare`; the network is then left as it was.
    """
    prepare(model, methods, keep_original=keep_original)()
    return model


@dataclass(frozen=True)
class QuantizedPart:
    """The layers of one method in a network.

    Attributes:
        method: With its knobs.
        linears: Number of layers.
        weights: Number of quantized weights; biases are not quantized.
        stored_bytes: Size of their codes and scales.
        runs_as: How the products are computed on the present device, with numbers of layers.
        kept: Whether the float layers are kept.
    """

    method: Quantization
    linears: int
    weights: int
    stored_bytes: int
    runs_as: dict[str, int]
    kept: bool

    def __str__(self) -> str:
        size = (
            f"{self.weights:,} weights in {self.stored_bytes / 1e6:,.1f} MB "
            f"({2 * self.weights / 1e6:,.1f} MB in bfloat16, {4 * self.weights / 1e6:,.1f} MB in float32)"
        )
        runs = "; ".join(f"{count} x {how}" for how, count in self.runs_as.items())
        kept = "; the float weights are kept beside them" if self.kept else ""
        return f"quantization of {self.linears} linear layers: {self.method}; {size}; {runs}{kept}"


def quantized_parts(model: nn.Module) -> list[QuantizedPart]:
    """The layers of each method, in the order of its first layer."""
    groups: dict[Quantization, list[QuantizedLinear]] = {}
    for layer in quantized_linears(model).values():
        groups.setdefault(layer.method, []).append(layer)
    return [
        QuantizedPart(
            method=method,
            linears=len(layers),
            weights=sum(layer.in_features * layer.out_features for layer in layers),
            stored_bytes=sum(layer.stored_bytes for layer in layers),
            runs_as=dict(Counter(layer.runs_as for layer in layers)),
            kept=any(layer.original for layer in layers),
        )
        for method, layers in groups.items()
    ]
