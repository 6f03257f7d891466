"""Second moments of the activations that enter linear layers, added up batch by batch.

The second moments of the inputs determine the output error of any change to the weights, so no activations are kept:
with rows x of the input, the error of a weight change D is ``sum (D x)^2 = trace(D G D^T)``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.errors import UserError
from geoaccel.quantization.calibrate.prefix import Batch
from geoaccel.quantization.calibrate.progress import Progress


@dataclass
class InputStatistics:
    """Statistics of one linear layer with K inputs.

    Attributes:
        gram: [K, K], sum of x^T x over the tokens.
        magnitude: [K], sum of |x|.
        tokens: Number of tokens.
    """

    gram: Tensor
    magnitude: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, inputs: int, device: torch.device) -> InputStatistics:
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device))

    def add(
        self,
        rows: Tensor,  # [T, K]
    ) -> None:
        rows = rows.float()
        self.gram.addmm_(rows.T, rows)
        self.magnitude += rows.abs().sum(0)
        self.tokens += len(rows)

    def error(
        self,
        difference: Tensor,  # [N, K]
    ) -> float:
        """Mean over the tokens of the squared output error of a weight change."""
        return float(((difference @ self.gram) * difference).sum()) / self.tokens


def patch_rows(
    x: Tensor,  # [n, N, K], or [T, K] of whole frames
    context: AttentionContext | None,
) -> Tensor:  # [T, K]
    """The tokens that are patches of images.

    Camera and register tokens have far larger norms than patches and are a hundred times fewer. Where the layout is not
    known, in transformers inside heads, every token counts.

    Raises:
        ValueError: If tokens are merged, or not whole frames.
    """
    if context is None or context.layout is None:
        return x.reshape(-1, x.shape[-1])
    layout = context.layout
    if context.packing is not None or x.numel() // x.shape[-1] % layout.tokens_per_frame:
        raise UserError("calibration needs whole frames; remove merging methods, and give fewer frames at a time")
    frames = x.reshape(-1, layout.tokens_per_frame, x.shape[-1])
    return frames[:, layout.num_special :].reshape(-1, x.shape[-1])


@contextmanager
def watch(
    model: nn.Module, names: Collection[str], statistics: dict[str, InputStatistics], *, patches_only: bool
) -> Iterator[None]:
    """Add up the inputs of linear layers while the model runs.

    Args:
        model: Its attentions are called with an ``AttentionContext``.
        names: The layers.
        statistics: Where they are added up, by name of the layer.
        patches_only: Leave out special tokens.
    """
    context: list[AttentionContext | None] = [None]

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        context[0] = args[1]

    def add(name: str, x: Tensor) -> None:
        rows = patch_rows(x, context[0] if patches_only else None)
        if name not in statistics:
            statistics[name] = InputStatistics.empty(x.shape[-1], x.device)
        statistics[name].add(rows)

    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "mixer"):
            handles.append(module.register_forward_pre_hook(note))
        if name in names:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(
    model: nn.Module,
    names: Collection[str],
    batches: Iterable[Batch],
    *,
    patches_only: bool = True,
    progress: Progress | None = None,
) -> dict[str, InputStatistics]:
    """Run images through a model and accumulate statistics of the inputs of its linear layers.

    Args:
        model: Float.
        names: The layers.
        batches: Each gives images [B, S, 3, H, W].
        patches_only: Leave out special tokens.
        progress: Stores sums after every batch; batches already included are not repeated.

    Raises:
        ValueError: If there are no images, they contain NaN or infinite values, or a layer was never used.
    """
    statistics, done = _read(progress, next(model.parameters()).device)
    for number, load in enumerate(batches):
        if number < done:
            continue
        images = load()
        if not images.isfinite().all():
            raise UserError(f"images of calibration batch {number} contain NaN or infinite values; leave them out")
        with watch(model, names, statistics, patches_only=patches_only):
            model(images)
        if progress is not None:
            _write(progress, statistics, number + 1)
    if not statistics:
        raise UserError("the calibration set is empty; give images")
    unused = [name for name in names if name not in statistics]
    if unused:
        raise UserError(f"{len(unused)} layers were not used during calibration (first: {unused[0]}); exclude them")
    return statistics


def _read(progress: Progress | None, device: torch.device) -> tuple[dict[str, InputStatistics], int]:
    kept = None if progress is None else progress.read_tensors("statistics")
    if kept is None:
        return {}, 0
    tensors, notes = kept
    return {
        name: InputStatistics(tensors[f"{name}.gram"].to(device), tensors[f"{name}.magnitude"].to(device), tokens)
        for name, tokens in notes["tokens"].items()
    }, notes["batches"]


def _write(progress: Progress, statistics: Mapping[str, InputStatistics], batches: int) -> None:
    tensors: dict[str, Tensor] = {}
    for name, entry in statistics.items():
        tensors |= {f"{name}.gram": entry.gram, f"{name}.magnitude": entry.magnitude}
    notes = {"batches": batches, "tokens": {name: entry.tokens for name, entry in statistics.items()}}
    progress.write_tensors("statistics", tensors, notes)
