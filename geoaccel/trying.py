"""Methods for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from geoaccel.api import accelerate
from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.linears import quantized_linears
from geoaccel.quantization.swap import has_floats, restore_linears
from geoaccel.slots import fill_slots, filled_slots


@contextmanager
def accelerated(model: nn.Module, **methods: Any) -> Iterator[nn.Module]:
    """Accelerate a model within a ``with`` block; afterwards it is restored bit for bit.

    For comparisons: :func:`geoaccel.accelerate` works in place, so no copy of the weights is needed. With quantization,
    float and quantized weights are in memory together.

    Example:
        >>> dense = model(images)
        >>> with geoaccel.accelerated(model, merging="asymmetric") as fast:
        ...     merged = fast(images)

    Args:
        model: A geoaccel model, or an upstream model object, which is adopted.
        methods: Arguments of :func:`geoaccel.accelerate`, except ``keep_original``.

    Yields:
        The accelerated model.

    Raises:
        ValueError: As :func:`geoaccel.accelerate`.
    """
    if "keep_original" in methods:
        raise UserError("keep_original: accelerated() keeps the float weights anyway; leave it out")
    if not isinstance(getattr(model, "backbone", None), Backbone):
        model = accelerate(model)  # adopts
    slots, layers = filled_slots(model), quantized_linears(model)
    try:
        # Without float weights there is nothing to restore, and the quantized ones stay.
        yield accelerate(model, **methods, keep_original=has_floats(model))
    finally:
        if quantized_linears(model) != layers:
            restore_linears(model)
            for name, layer in layers.items():
                model.set_submodule(name, layer)
        fill_slots(slots)
