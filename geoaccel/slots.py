"""Saving and restoring the contents of a model's slots."""

from __future__ import annotations

from typing import Any

from torch import nn

Slots = list[tuple[nn.Module, str, Any]]
"""Each module with a slot, the name of the slot, and its content."""


def filled_slots(model: nn.Module) -> Slots:
    """The present contents of all slots of a model."""
    names = ("mixer", "token_packer")
    return [
        (module, name, getattr(module, name)) for module in model.modules() for name in names if hasattr(module, name)
    ]


def fill_slots(slots: Slots) -> None:
    """Restore the contents returned by :func:`filled_slots`."""
    for module, name, thing in slots:
        setattr(module, name, thing)
