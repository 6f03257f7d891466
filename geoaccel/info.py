"""``geoaccel info``: installed packages, what works on this machine, and properties of a checkpoint."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from geoaccel.attention_kernels import KERNELS
from geoaccel.backbone import BACKBONES
from geoaccel.images import load_images
from geoaccel.kernels.choice import why_not as compiled_why_not
from geoaccel.kernels.fp8 import fp8, runs_as
from geoaccel.memory import activation_bytes
from geoaccel.merging.calibration import in_use
from geoaccel.merging.method import MERGING
from geoaccel.models.files import json_object, list_models, origins, resolve
from geoaccel.models.outline import without_weights
from geoaccel.models.shards import weights_of
from geoaccel.models.weights import history, read_config, read_weights, recognise
from geoaccel.quantization import QUANTIZATION
from geoaccel.registry import Registry
from geoaccel.runtime import auto_dtype
from geoaccel.version import __version__

OPTIONAL = {
    "open3d": "eval, mesh: point metrics on Open3D's engine, meshes",
    "OpenEXR": "exr: depth in EXR",
    "scipy": "eval: point metrics",
    "pycolmap": "eval: checks of COLMAP models",
    "xformers": "cuda: attention kernels",
    "triton": "cuda: compiled kernels",
    "transformers": "mllm: multimodal language models",
    "ray": "ray: evaluation, windows and scenes on several machines",
    "av": "video input",
    "trimesh": "PLY and GLB output",
}
NOTES = ("config", "provenance")
SYSTEM_LIBRARIES = "apt-get install libusb-1.0-0 libgl1 libegl1 libx11-6"


def describe_machine() -> str:
    """Versions, devices, attention kernels (with the reason if one does not run), optional packages, models."""
    lines = [f"geoaccel {__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append(f"no CUDA device; CPU with {torch.get_num_threads()} threads")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = auto_dtype(here)
    lines.append(f"dtype chosen by auto on {here}: {dtype} ({why})")
    lines.append("attention kernels:")
    for name, kernel in KERNELS.items():
        lines.append(f"  {name}: {_probe(kernel)}")
    reason = compiled_why_not(torch.device(here))
    lines.append(f"compiled kernels for merging: {'work' if reason is None else f'not used ({reason})'}")
    lines.append(f"rates for predicting speedups: {in_use(here)}")
    for what, registry in (("merging", MERGING), ("quantization", QUANTIZATION), ("backbones", BACKBONES)):
        lines.append(f"{what}: {', '.join(_with_package(registry, name) for name in sorted(registry))}")
    lines.append("optional packages:")
    for name, purpose in OPTIONAL.items():
        lines.append(f"  {name}: {_installed(name)} ({purpose})")
    lines.append("models in the package: " + (", ".join(list_models()) or "none"))
    lines.append("published checkpoints:")
    for hub_id, (backbone, origin) in origins().items():
        note = f"; {origin.note}" if origin.note else ""
        lines.append(f"  {hub_id} ({backbone.name}): {origin.licence}{note}")
    return "\n".join(lines)


def describe_checkpoint(name_or_path: str) -> str:
    """Backbone, size, precision, licence and provenance of a checkpoint, without building it.

    A hub id that is not on this machine is described from the package's own records, not downloaded.
    """
    known = origins().get(name_or_path)
    if known is not None:
        backbone, origin = known
        allowed = "allowed" if origin.commercial else "not allowed"
        told = "" if backbone.conditions is None else f"\noptional conditions: {', '.join(backbone.conditions.takes)}"
        note = f"\nnote: {origin.note}" if origin.note else ""
        return (
            f"{name_or_path}: {backbone.name}\nlicence: {origin.licence}\ncommercial use: {allowed}\n"
            f"origin: https://huggingface.co/{name_or_path} ({' or '.join(origin.files)}){note}"
            f"{told}\nunit of predictions: {backbone.unit}"
        )
    path = resolve(name_or_path)
    tensors, metadata = read_weights(path)
    backbone = recognise(tensors, metadata, path)
    network = without_weights(backbone, read_config(backbone, tensors, metadata, path))
    parameters = sum(parameter.numel() for parameter in network.parameters())  # a file may pack several into a byte
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    lines = [
        f"{name_or_path}: {backbone.name}, {parameters:,} parameters in {len(tensors):,} tensors, {', '.join(dtypes)}, "
        f"{sum(part.stat().st_size for part in weights_of(path)) / 1e6:.1f} MB",
        f"file: {path.name}",
    ]
    said = {key: json_object(metadata[key], f"the {key} of {name_or_path}") for key in NOTES if key in metadata}
    source = said.get("provenance", {}).get("source", name_or_path)
    if source in list_models():
        made = "" if source == name_or_path else f"; made from {source}"
        lines.append(f"licence: Apache-2.0 (trained by this project on its own procedural scenes{made})")
    elif source in backbone.origins:
        lines.append(f"licence: {backbone.origins[source].licence}; made from {source}")
    else:
        lines.append("licence: not recorded in the file; weights derived from a published checkpoint keep its licence:")
        lines += [f"  {hub_id}: {origin.licence}" for hub_id, origin in backbone.origins.items()]
    for key, notes in said.items():
        lines.append(f"{key}:")
        lines += [f"  {name}: {value}" for name, value in notes.items() if name != "source_provenance"]
        for step in history(notes):
            facts = [(name, value) for name, value in step.items() if not isinstance(value, Mapping | list)]
            lines.append(f"  after {', '.join(f'{name} {value}' for name, value in facts)}")
    card = path.with_suffix(".md")
    if card.exists():
        lines.append(f"card: {card}")
    return "\n".join(lines)


FRAMES = (10, 100, 300, 1000)
IMAGE_SIZE = (1080, 1440)
"""Height and width of the images that costs refer to."""


def describe_backbones() -> str:
    """A table of the published checkpoints (Markdown): inputs, outputs, cost and licence."""
    costs = [f"{frames} frames" for frames in FRAMES]
    lines = [
        _row(
            "checkpoint",
            "parameters",
            "licence",
            "commercial use",
            "takes besides images",
            "heads",
            "unit",
            "input",
            *costs,
        )
    ]
    lines.append("|" + "---|" * (8 + len(costs)))
    for hub_id, (backbone, origin) in origins().items():
        told = () if backbone.conditions is None else backbone.conditions.takes
        model = without_weights(backbone, origin.config)
        height, width = _input_size(model)
        lines.append(
            _row(
                f"`{hub_id}` ({backbone.name})",
                f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.0f} M",
                origin.licence,
                "yes" if origin.commercial else "no",
                ", ".join(told) or "-",
                ", ".join(model.heads),
                backbone.unit,
                f"{width} x {height}",
                *(_cost(model, frames, (height, width)) for frames in FRAMES),
            )
        )
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _input_size(model: Any) -> tuple[int, int]:
    """(H, W) of the network input for the images that costs refer to."""
    batch = load_images([np.zeros((*IMAGE_SIZE, 3), np.uint8)], model.preprocess)
    return batch.images.shape[-2], batch.images.shape[-1]


def _cost(model: Any, frames: int, size: tuple[int, int]) -> str:
    """TFLOP of a dense forward with all heads, and GiB of weights and activations."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gib = (weights + activation_bytes(model, frames, size, "cuda")) / 2**30
    return f"{_digits(model.cost(frames, size).total / 1e12)} TFLOP, {_digits(gib)} GiB"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _with_package(registry: Registry[Any], name: str) -> str:
    """A registered name, with the module that registered it if it is from another package."""
    thing = getattr(registry[name], "network", registry[name])
    module = thing.__module__
    return name if module.partition(".")[0] == "geoaccel" else f"{name} (of {module})"


def _probe(kernel: Callable[..., torch.Tensor]) -> str:
    """Run a kernel on a few numbers on the default device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    works: list[str] = []
    reasons: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 2, 4, 32, device=device, dtype=dtype)
        try:
            kernel(x, x, x, None)
            works.append(str(dtype).removeprefix("torch."))
        except (RuntimeError, ImportError) as error:
            reasons[str(dtype).removeprefix("torch.")] = str(error).splitlines()[0]
    if not works:
        return f"does not work on {device}: {'; '.join(dict.fromkeys(reasons.values()))}"
    how = f" ({runs_as(torch.device(device))})" if kernel is fp8 else ""
    refused = "".join(f"; {dtype}: {reason}" for dtype, reason in reasons.items())
    return f"works on {device} in {', '.join(works)}{how}{refused}"


def _installed(name: str) -> str:
    """Version, or why the package cannot be imported."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if name != "open3d":
        return version
    try:
        importlib.import_module(name)
    except ImportError as error:  # open3d is installed but its system libraries are missing
        return f"{version}, but does not import ({str(error).splitlines()[0]}); {SYSTEM_LIBRARIES}"
    return version
