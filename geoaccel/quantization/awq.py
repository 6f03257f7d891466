"""AWQ: scales of input channels, chosen on real activations and folded away, that make the loud channels exact.

A linear layer sees the same product where its weights are multiplied, and its inputs divided, by a scale for each
channel. Rounding does not: channels with large activations get finer steps. Where the inputs come straight out of a
norm or of a linear layer, that one divides, and the network has no more operations than before.

Paper: Lin et al., MLSys 2024, arXiv 2306.00978; without camera and register tokens in the statistics as in QVGGT, Pan
et al., CVPR 2026, arXiv 2605.31124.
Differs from the papers in: the error that scales are chosen by is that of the layer alone, not of the attention or the
task; weights are not clipped; the second layer of an MLP is left alone, as its inputs come out of a GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.quantization.method import Quantization
from geoaccel.quantization.statistics import InputStatistics, collect
from geoaccel.quantization.swap import float_linears

EXPONENTS = tuple(round(0.05 * step, 2) for step in range(20))
SMALLEST_MAGNITUDE = 1e-4


@dataclass(frozen=True)
class Fold:
    """A linear layer whose input channels can be scaled.

    Attributes:
        linear: Its name.
        source: Name of the layer that its inputs come out of.
        rows: How many of the source's last outputs those are; None for all.
    """

    linear: str
    source: str
    rows: int | None = None


@dataclass(frozen=True)
class Scaling:
    """What was chosen for one layer.

    Attributes:
        fold: Where.
        scale: [K], what the weights are multiplied with.
        exponent: Of the activations' magnitude; 0 changes nothing.
        error: Mean squared output error of the quantized layer over that without scales.
    """

    fold: Fold
    scale: Tensor
    exponent: float
    error: float


def find_folds(model: nn.Module) -> list[Fold]:
    """The scalable layers of every transformer block (``norm1``, ``attn``, ``norm2``, ``mlp``), in order.

    Attention mixes tokens and not channels, and its values pass no norm: what enters the output projection can be
    divided in the rows of the fused ``qkv`` that make values.
    """
    folds = []
    modules = dict(model.named_modules())
    for name in modules:
        parts = {part: modules.get(f"{name}.{part}") for part in ("norm1", "norm2")}
        inner = {part: modules.get(f"{name}.{part}") for part in ("attn.qkv", "attn.proj", "mlp.fc1")}
        if all(isinstance(m, nn.LayerNorm) and m.elementwise_affine for m in parts.values()) and all(
            isinstance(m, nn.Linear) for m in inner.values()
        ):
            projection = inner["attn.proj"]
            assert isinstance(projection, nn.Linear)
            folds += [
                Fold(f"{name}.attn.qkv", f"{name}.norm1"),
                Fold(f"{name}.attn.proj", f"{name}.attn.qkv", rows=projection.in_features),
                Fold(f"{name}.mlp.fc1", f"{name}.norm2"),
            ]
    return folds


def candidate(
    magnitude: Tensor,  # [K], mean |x| of each channel
    exponent: float,
) -> Tensor:  # [K]
    """Scales that grow with a power of the activations, around 1."""
    scale = magnitude.clamp(min=SMALLEST_MAGNITUDE).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def choose(linear: nn.Linear, statistics: InputStatistics, method: Quantization, fold: Fold) -> Scaling:
    """Try every exponent and keep the one with the smallest output error; that without scales is among them."""
    weight = linear.weight.detach().float()
    magnitude = statistics.magnitude / statistics.tokens
    best: tuple[float, float, Tensor] | None = None
    plain = 0.0
    for exponent in EXPONENTS:
        scale = candidate(magnitude, exponent)
        error = statistics.error(method.round_trip(weight * scale) / scale - weight)
        if exponent == 0:
            plain = error
        if best is None or error < best[0]:
            best = error, exponent, scale
    assert best is not None
    return Scaling(fold, best[2], best[1], best[0] / plain if plain else 1.0)


@torch.no_grad()
def apply_scale(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiply the inputs' weights and divide their source; in float the network stays the same.

    Parameters are replaced, not written to: they may be those of a file, or of another object.
    """
    linear: Any = model.get_submodule(fold.linear)
    source: Any = model.get_submodule(fold.source)
    _replace(linear, "weight", lambda weight: weight * scale)
    if fold.rows is None:
        _replace(source, "weight", lambda weight: weight / scale if weight.ndim == 1 else weight / scale[:, None])
        _replace(source, "bias", lambda bias: bias / scale)
        return
    first = len(source.weight) - fold.rows
    _replace(source, "weight", lambda weight: torch.cat([weight[:first], weight[first:] / scale[:, None]]))
    _replace(source, "bias", lambda bias: torch.cat([bias[:first], bias[first:] / scale]))


def _replace(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = getattr(module, name)
    if old is not None:
        new = change(old.detach().float()).to(old.dtype)
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def scale_activations(
    model: nn.Module,
    method: Quantization,
    batches: Iterable[Tensor],
    *,
    patches_only: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> list[Scaling]:
    """Choose and fold scales for the layers that a method is going to quantize; in place, before it does.

    Args:
        model: Float; its outputs change by rounding alone.
        method: The one that will quantize it.
        batches: Photographs [B, S, 3, H, W] in [0, 1], as the model takes them.
        patches_only: Leave camera and register tokens out of the statistics.
        report: Called with a line of text for each layer.

    Raises:
        ValueError: If there are no photographs, or no layer that can be scaled.
    """
    linears = float_linears(model)
    taken = set(method.select(linears))
    folds = [fold for fold in find_folds(model) if fold.linear in taken]
    if not folds:
        raise ValueError(f"none of the {len(taken)} layers that {method} quantizes is in a transformer block")
    statistics = collect(model, [fold.linear for fold in folds], batches, patches_only=patches_only)
    scalings = []
    for fold in folds:
        scaling = choose(linears[fold.linear], statistics.pop(fold.linear), method, fold)
        apply_scale(model, fold, scaling.scale)
        scalings.append(scaling)
        report(f"{fold.linear}: exponent {scaling.exponent:.2f}, error x {scaling.error:.3f}")
    return scalings
