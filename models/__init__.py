"""The backbones: networks reimplemented here with upstream's parameter names, and their checkpoints.

Every module of this package is imported: adding a file registers its backbone.
"""

if not __name__.startswith("geoaccel."):
    raise ImportError(
        f"this folder installs as geoaccel.models; {__name__!r} would load a second copy: pip install -e ."
    )

import pkgutil
from importlib import import_module
from typing import Any

from torch import nn

from geoaccel.backbone import BACKBONES

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def build(backbone: str, **config: Any) -> nn.Module:
    """Build a network of any size, with random weights.

    Args:
        backbone: A registered name.
        config: Keyword arguments of its configuration, such as :class:`geoaccel.models.vggt.VGGTConfig`; the defaults
            are the published sizes. Build under ``torch.device("meta")`` for shapes without memory.

    Raises:
        ValueError: For an unknown backbone or keyword, or sizes that do not fit.
    """
    return BACKBONES[backbone].build(**config)


__all__ = ["BACKBONES", "build"]
