"""The backbones: networks written here with upstream's parameter names, and their checkpoints."""

if not __name__.startswith("geoaccel."):
    raise ImportError(
        f"this folder installs as geoaccel.models; {__name__!r} would load a second copy: pip install -e ."
    )

from inspect import signature
from typing import Any

from torch import nn

from geoaccel.backbone import BACKBONES
from geoaccel.errors import UserError
from geoaccel.models import pi3, vggt  # noqa: F401  (each registers itself)
from geoaccel.registry import unknown


def build(backbone: str, **config: Any) -> nn.Module:
    """A network with random weights, of any size.

    Args:
        backbone: ``vggt`` or ``pi3``.
        config: Keyword arguments of :class:`geoaccel.models.vggt.VGGT` or :class:`geoaccel.models.pi3.Pi3`; the
            defaults are the published sizes, 1.26 and 0.96 billion parameters. Build under ``torch.device("meta")``
            for shapes without memory.

    Raises:
        ValueError: For an unknown backbone or keyword.
    """
    found = BACKBONES[backbone]
    known = signature(found.network).parameters
    for name in config:
        if name not in known:
            raise UserError(unknown(f"keyword of {backbone}", name, list(known)))
    return found.network(**config)


__all__ = ["BACKBONES", "build"]
