"""AWQ: scales of input channels, chosen on real activations and folded into the network, that protect outlier channels.

The product of a linear layer does not change if its weights are multiplied, and its inputs divided, by a scale for each
channel. But rounding does: channels with large activations get finer steps. If the inputs are the output of a norm or a
linear layer, the division is folded into that, and the network has no more operations than before.

Paper: Lin et al., MLSys 2024, arXiv 2306.00978; without camera and register tokens in the statistics as in QVGGT, Pan
et al., CVPR 2026, arXiv 2605.31124.
Differs from the papers in: the error of candidates is that of the layer alone, not of the attention around it; weights
are not clipped; the second layer of an MLP is not scaled if its inputs come from a GELU.
:mod:`geoaccel.quantization.calibrate.search` chooses among the candidates for a whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.quantization.calibrate.blocks import find_blocks
from geoaccel.quantization.calibrate.statistics import InputStatistics
from geoaccel.quantization.method import Quantization

EXPONENTS = tuple(round(0.05 * step, 2) for step in range(20))
SMALLEST_MAGNITUDE = 1e-4


@dataclass(frozen=True)
class Fold:
    """A linear layer whose input channels can be scaled.

    Attributes:
        linear: Its name.
        source: Name of the layer whose outputs are its inputs.
        rows: Number of the source's last outputs that these are; None for all.
    """

    linear: str
    source: str
    rows: int | None = None


@dataclass(frozen=True)
class Scaling:
    """The scale chosen for one layer.

    Attributes:
        fold: Its layer and source.
        scale: [K], factor of the weights.
        exponent: Exponent of the activations' magnitude; 0 changes nothing.
        error: Mean squared output error of the quantized layer over that without scales.
        relative: The same over the mean squared output.
    """

    fold: Fold
    scale: Tensor
    exponent: float
    error: float
    relative: float


def find_folds(model: nn.Module) -> list[Fold]:
    """The scalable layers of every transformer block (``norm1``, ``attn``, ``norm2``, ``mlp``), in order.

    Attention mixes tokens and not channels, and values are not normalised: inputs of the output projection can be
    scaled in the value rows of the fused ``qkv``. Inputs of the last layer of a gated MLP are products of a gate and a
    value, and can be scaled in the last rows of the fused first layer, which compute the values.
    """
    folds = []
    for name, (first, *gated) in find_blocks(model).items():
        projection: Any = model.get_submodule(f"{name}.attn.proj")
        folds += [
            Fold(f"{name}.attn.qkv", f"{name}.norm1"),
            Fold(f"{name}.attn.proj", f"{name}.attn.qkv", rows=projection.in_features),
            Fold(f"{name}.{first}", f"{name}.norm2"),
        ]
        for last in gated:
            linear: Any = model.get_submodule(f"{name}.{last}")
            folds.append(Fold(f"{name}.{last}", f"{name}.{first}", rows=linear.in_features))
    return folds


def candidate(
    magnitude: Tensor,  # [K], mean |x| of each channel
    exponent: float,
) -> Tensor:  # [K]
    """Scales proportional to a power of the activations, around 1."""
    scale = magnitude.clamp(min=SMALLEST_MAGNITUDE).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def rank(linear: nn.Linear, statistics: InputStatistics, method: Quantization, fold: Fold) -> list[Scaling]:
    """Every exponent, the one with the smallest output error first; that without scales is among them."""
    weight = linear.weight.detach().float()
    magnitude = statistics.magnitude / statistics.tokens
    scales = {exponent: candidate(magnitude, exponent) for exponent in EXPONENTS}
    errors = {
        exponent: statistics.error(method.round_trip(weight * scale) / scale - weight)
        for exponent, scale in scales.items()
    }
    plain, signal = errors[0.0], statistics.error(weight)
    return [
        Scaling(
            fold,
            scales[exponent],
            exponent,
            error=errors[exponent] / plain if plain else 1.0,
            relative=errors[exponent] / signal if signal else 0.0,
        )
        for exponent in sorted(errors, key=lambda exponent: (errors[exponent], exponent))
    ]


@torch.no_grad()
def apply_scale(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiply the weights of the input channels and divide their source; in float the network is unchanged.

    Parameters are replaced, not modified: they may be memory-mapped from a file, or shared.
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
