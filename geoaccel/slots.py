"""What stands in the slots of a model, to be kept and put back."""

from __future__ import annotations

from typing import Any

from torch import nn

Slots = list[tuple[nn.Module, str, Any]]
"""Each module with a slot, the name of the slot, and what stands there."""


def filled_slots(model: nn.Module) -> Slots:
    """What stands in every slot of a model now."""
    names = ("mixer", "token_packer")
    return [
        (module, name, getattr(module, name)) for module in model.modules() for name in names if hasattr(module, name)
    ]


def fill_slots(slots: Slots) -> None:
    """Put back what :func:`filled_slots` found."""
    for module, name, thing in slots:
        setattr(module, name, thing)
