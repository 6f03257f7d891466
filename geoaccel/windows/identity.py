"""What a run was made of, so that another one goes on from its windows only where it is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from geoaccel.api import describe
from geoaccel.backbone import Preprocess
from geoaccel.fingerprint import of_bytes, of_networks, of_sources
from geoaccel.images.sources import MemoryPicture, Picture, VideoPicture

SAMPLED = 64
"""Numbers of every tensor of a network that tell its weights from others."""


def settings_of(
    model: nn.Module, pictures: Sequence[Picture], preprocess: Preprocess, options: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides what windows hold, as plain data.

    Args:
        model: With its methods.
        pictures: Of the sequence; files count by place, size and time of their last change.
        preprocess: How they are brought to the network's size.
        options: Of the run.
    """
    described = describe(model)
    return {
        "model": [described.backbone, described.dtypes, described.device],
        "methods": [[action.place, repr(action.method), list(action.layers or [])] for action in described.merging]
        + [repr(part) for part in described.quantization],
        "kernels": described.mixers,
        "weights": _weights(model),
        "code": [of_networks(), of_sources(("windows",))],
        "images": of_bytes(json.dumps([_identity(picture) for picture in pictures]).encode()),
        "input": [preprocess.mode, preprocess.size, preprocess.max_pixels],
        **options,
    }


def _weights(model: nn.Module) -> str:
    """Of the weights: their shapes, where they are, and some numbers of each."""
    parts: list[bytes] = []
    for name, tensor in _tensors(model):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].float().cpu()
        parts += [f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode(), some.numpy().tobytes()]
    return of_bytes(*parts)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _identity(picture: Picture) -> list[Any]:
    if isinstance(picture, MemoryPicture):
        return [picture.name, of_bytes(picture.read().tobytes())]
    path, extra = (picture.video.path, picture.stamp) if isinstance(picture, VideoPicture) else (picture.path, 0)
    if path is None:
        return [picture.name]
    changed = path.stat()
    return [picture.name, str(path.resolve()), changed.st_size, changed.st_mtime_ns, extra]
