"""Compensated rounding of a network, front to back: every layer is rounded for inputs from the quantized earlier ones.

Blocks run in order, once: statistics of the next block's inputs are accumulated while it is still float, and later
blocks get its quantized output. So later blocks also compensate errors of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.linears import QuantizedLinear
from geoaccel.quantization.calibrate.blocks import blocks_of, running_order
from geoaccel.quantization.calibrate.prefix import Batch, Prefix
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.calibrate.search import Track, silently
from geoaccel.quantization.calibrate.statistics import InputStatistics, watch
from geoaccel.quantization.method import Quantization, scope_of
from geoaccel.quantization.swap import float_linears, owners


@torch.no_grad()
def quantize_compensated(
    model: nn.Module,
    methods: Quantization | Sequence[Quantization],
    batches: Sequence[Batch],
    *,
    patches_only: bool = True,
    progress: Progress | None = None,
    track: Track[Any] = silently,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Replace linear layers by quantized ones with compensated rounding (GPTQ), in place.

    Args:
        model: Float, with its scales.
        methods: Methods for different layers; those that cannot use second moments round as usual.
        batches: Each returns images [B, S, 3, H, W] in [0, 1], preprocessed for the model.
        patches_only: Leave camera and register tokens out of the second moments.
        progress: Stores finished layers, which are not rounded again.
        track: Iterates over blocks, with a progress bar.
        report: Called with a line of text for each.

    Returns:
        For every layer with compensated rounding, its mean squared output error over that of rounding to nearest.

    Raises:
        ValueError: If there are no images, or a layer was never used.
    """
    if not batches:
        raise UserError("the calibration set is empty; give images")
    linears = float_linears(model)
    methods = [methods] if isinstance(methods, Quantization) else list(methods)
    owner = owners(linears, methods, scope_of(model))
    trunk, _ = running_order(model, batches[0]())
    layers = blocks_of(owner)
    prefix = Prefix(model, trunk, batches)
    run = _Rounding(model, owner, patches_only, progress)
    for block in track(trunk, "rounding", len(trunk)):
        with run.watching(layers.get(block, ())) as statistics:
            if run.wanted(layers.get(block, ())):
                prefix.reach()
        run.round(layers.pop(block, []), statistics)
        prefix.advance()
        report(f"{block}: rounded")
    behind = [name for names in layers.values() for name in names]
    with run.watching(behind) as statistics:
        if run.wanted(behind):
            for _ in prefix.forwards():
                pass
    run.round(behind, statistics)
    return run.gains


class _Rounding:
    """Layers of a network, replaced one after the other."""

    def __init__(
        self, model: nn.Module, owner: Mapping[str, Quantization], patches_only: bool, progress: Progress | None
    ) -> None:
        self.model, self.owner, self.patches_only, self.progress = model, owner, patches_only, progress
        self.gains: dict[str, float] = {}

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Layers whose inputs must be known."""
        return [name for name in names if self.owner[name].uses_gram and self._kept(name) is None]

    @contextmanager
    def watching(self, names: Sequence[str]) -> Iterator[dict[str, InputStatistics]]:
        statistics: dict[str, InputStatistics] = {}
        with watch(self.model, self.wanted(names), statistics, patches_only=self.patches_only):
            yield statistics

    def round(self, names: Sequence[str], statistics: Mapping[str, InputStatistics]) -> None:
        """Quantize these layers, and replace them."""
        for name in names:
            linear: Any = self.model.get_submodule(name)
            method = self.owner[name]
            if not method.uses_gram:
                self.model.set_submodule(name, method.quantize(linear, name))
                continue
            kept = self._kept(name)
            if kept is None:
                if name not in statistics:
                    raise UserError(f"layer {name} was not used during calibration; exclude it")
                quantized = method.quantize(linear, name, statistics[name].gram)
                self.gains[name] = _gain(linear, quantized, statistics[name])
                if self.progress is not None:
                    tensors = {key: getattr(quantized, key) for key in quantized.stored}
                    self.progress.write_tensors(f"rounded-{name}", tensors, {"gain": self.gains[name]})
            else:
                tensors, notes = kept
                quantized = _from_codes(method, linear, tensors)
                self.gains[name] = notes["gain"]
            self.model.set_submodule(name, quantized)

    def _kept(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None if self.progress is None else self.progress.read_tensors(f"rounded-{name}")


def _gain(linear: nn.Linear, quantized: QuantizedLinear, statistics: InputStatistics) -> float:
    weight = linear.weight.detach().float()
    nearest = statistics.error(quantized.method.round_trip(weight) - weight)
    return statistics.error(quantized.dequantize() - weight) / nearest if nearest else 1.0


def _from_codes(method: Quantization, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """A quantized layer from stored codes."""
    layer = method.layer(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    for key, value in tensors.items():
        setattr(layer, key, value.to(linear.weight.device))
    if linear.bias is not None:
        layer.bias = linear.bias.detach()
    return layer.train(linear.training)
