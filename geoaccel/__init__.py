"""Fast and small feed-forward 3D reconstruction: VGGT and pi3, any method, any precision, one line.

Names are imported when they are first used: ``geoaccel --help`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from geoaccel.version import __version__

if TYPE_CHECKING:
    from geoaccel.api import accelerate, describe, list_merging, list_quantization, restore
    from geoaccel.models.files import list_models
    from geoaccel.models.weights import adopt, load_model
    from geoaccel.reconstruction import Reconstruction, reconstruct
    from geoaccel.sharding import parallel
    from geoaccel.trying import accelerated
    from geoaccel.windows import reconstruct_windows
else:
    _PLACES = {
        "Reconstruction": "geoaccel.reconstruction",
        "accelerate": "geoaccel.api",
        "accelerated": "geoaccel.trying",
        "adopt": "geoaccel.models.weights",
        "describe": "geoaccel.api",
        "list_merging": "geoaccel.api",
        "list_models": "geoaccel.models.files",
        "list_quantization": "geoaccel.api",
        "load_model": "geoaccel.models.weights",
        "parallel": "geoaccel.sharding",
        "reconstruct": "geoaccel.reconstruction",
        "reconstruct_windows": "geoaccel.windows",
        "restore": "geoaccel.api",
    }

    def __getattr__(name):
        """A public name, or a module of the package: ``geoaccel.models.build`` works after ``import geoaccel``."""
        if name in _PLACES:
            found = getattr(import_module(_PLACES[name]), name)
            globals()[name] = found
            return found
        module = f"{__name__}.{name}"
        if not name.startswith("_"):
            try:
                return import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "Reconstruction",
    "__version__",
    "accelerate",
    "accelerated",
    "adopt",
    "describe",
    "list_merging",
    "list_models",
    "list_quantization",
    "load_model",
    "parallel",
    "reconstruct",
    "reconstruct_windows",
    "restore",
]
