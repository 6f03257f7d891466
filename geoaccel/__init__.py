"""Fast and small feed-forward 3D reconstruction: VGGT and pi3, any method, any precision, one line."""

from geoaccel.api import accelerate, describe, list_merging, list_quantization, restore
from geoaccel.models.files import list_models
from geoaccel.models.weights import adopt, load_model
from geoaccel.reconstruction import Reconstruction, reconstruct
from geoaccel.sharding import parallel
from geoaccel.trying import accelerated
from geoaccel.version import __version__
from geoaccel.windows import reconstruct_windows

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
