"""Checks that a result labelled quantized comes from a quantized model.

A published evaluation of a quantized network built it, then loaded the float weights into a new one and scored that:
all its rows agree to four digits. Both checks here would have stopped it. They detect bugs, so they raise
``RuntimeError``, which no loop over scenes mistakes for a bad image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geoaccel.linears import quantized_linears
from geoaccel.quantization.method import Quantization


def assert_quantized(model: nn.Module, *methods: Quantization | str) -> None:
    """Check that a model has quantized layers of every method in the label of a run.

    Args:
        model: The model to be evaluated.
        methods: Configured methods, or names; empty requires any quantized layer.

    Raises:
        RuntimeError: If some are missing.
    """
    found = {layer.method for layer in quantized_linears(model).values()}
    names = {method.name for method in found}
    if not found:
        raise RuntimeError("the run is labelled quantized, but the evaluated model has no quantized layer")
    for method in methods:
        if method not in (names if isinstance(method, str) else found):
            listing = ", ".join(sorted(map(str, found)))
            raise RuntimeError(f"the run is labelled {method}, but the evaluated model has layers of {listing}")


def assert_outputs_differ(quantized: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Check that predictions on the same images are not those of the float model, bit for bit.

    Args:
        quantized: Predictions of the quantized model; ``images`` does not count.
        dense: Those of the float model.

    Raises:
        RuntimeError: If every prediction that both have is equal, or they have none in common.
    """
    common = [name for name in quantized if name in dense and name != "images" and isinstance(dense[name], Tensor)]
    if not common:
        raise RuntimeError("the quantized and the float model predicted nothing that could be compared")
    if all(torch.equal(quantized[name].cpu(), dense[name].cpu()) for name in common):
        raise RuntimeError(
            f"the run is labelled quantized, but its {', '.join(common)} equal those of the float model bit for bit"
        )
