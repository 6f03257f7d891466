"""Identity of a run: another one resumes from its windows only if this is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from geoaccel.api import describe
from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.fingerprint import difference, of_bytes, of_files, of_networks, of_others, of_sources
from geoaccel.images.elsewhere import file_of
from geoaccel.images.sources import MemoryPicture, Picture, VideoPicture
from geoaccel.prediction import needed_heads

SKIP_BAD = "skip_bad"
"""Name of the setting that leaves out images that cannot be read."""

SAMPLED = 64
"""Elements of every tensor of a network that identify its weights."""


@dataclass(frozen=True)
class Facts:
    """Properties of a model that a run needs, wherever the model is.

    Attributes:
        preprocess: Preprocessing of images.
        heads: Heads that run.
        identity: Everything about the model that affects windows, as plain data.
    """

    preprocess: Preprocess
    heads: tuple[str, ...]
    identity: dict[str, Any]


def facts_of(model: nn.Module) -> Facts:
    """The properties of a model."""
    network: Any = model
    return Facts(network.preprocess, tuple(needed_heads(model, "depth")), identity_of(model))


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, with its methods, that affects predictions, as plain data."""
    described = describe(model)
    methods = [*(action.method for action in described.merging), *(part.method for part in described.quantization)]
    files = [of_files(f"{number}.{method.name}", method) for number, method in enumerate(methods)]
    return {
        "model": [described.backbone, described.dtypes, described.device],
        "methods": [[action.place, repr(action.method), list(action.layers or [])] for action in described.merging]
        + [repr(part) for part in described.quantization],
        "kernels": described.mixers,
        "weights": _weights(model),
        "code": [of_networks(), of_sources(("windows",))],
        "packages": of_others(map(type, [model, *methods])),
        "files": {name: known for found in files for name, known in found.items()},
    }


def same(found: Sequence[dict[str, Any]]) -> None:
    """Refuse workers with different models.

    Args:
        found: The result of `identity_of` for each.

    Raises:
        UserError: Naming the difference.
    """
    for number, one in enumerate(found):
        if (other := difference(found[0], one)) is not None:
            raise UserError(
                f"worker {number + 1} of {len(found)} has a different model from the first ({other}); give --dtype, "
                "and the same checkpoint on all machines"
            )


def settings_of(pictures: Sequence[Picture], preprocess: Preprocess, options: dict[str, Any]) -> dict[str, Any]:
    """Everything besides the model that affects windows, as plain data.

    Args:
        pictures: Images of the sequence.
        preprocess: Their preprocessing.
        options: Options of the run.
    """
    return {
        "images": of_pictures(pictures),
        "input": [preprocess.mode, preprocess.size, preprocess.max_pixels],
        **options,
    }


def of_old(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier run, with the setting for bad images replaced if this run leaves them out.

    Such an image ended the earlier run, so that its finished windows contain none.
    """
    bolder = before.get(SKIP_BAD) is False and now.get(SKIP_BAD) is True
    return {**before, SKIP_BAD: True} if bolder else dict(before)


def of_pictures(pictures: Sequence[Picture]) -> str:
    """Fingerprint of images: files by path, size and modification time, rendered images by their ``key``.

    Others count by their pixels.
    """
    return of_bytes(json.dumps([_identity(picture) for picture in pictures]).encode())


def _weights(model: nn.Module) -> str:
    """Fingerprint of the weights: shapes, device, and some elements of each."""
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
    path, extra = file_of(picture), picture.stamp if isinstance(picture, VideoPicture) else 0
    if path is None:
        key = getattr(picture, "key", None)
        return [picture.name, of_bytes(picture.read().tobytes()) if key is None else key]
    if not path.exists():  # a broken link, which is an error when it is read
        return [picture.name, str(path)]
    changed = path.stat()
    return [picture.name, str(path.resolve()), changed.st_size, changed.st_mtime_ns, extra]
