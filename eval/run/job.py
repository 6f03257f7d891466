"""What makes a prediction, as plain data: it can be hashed, compared, written down and sent to another machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.api import place_mixer
from geoaccel.attention import FrameOnly
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.prepare import network_input
from geoaccel.eval.run.store import Photographs, Prediction
from geoaccel.eval.run.token_effects import effective_ratio
from geoaccel.images import ImageTransform
from geoaccel.merging.method import MERGING, Merging
from geoaccel.models.files import resolve
from geoaccel.models.weights import load_model
from geoaccel.quantization import QUANTIZATION, Quantization, assert_quantized
from geoaccel.registry import make

CONTROLS = ("frame-only",)


@dataclass(frozen=True)
class Job:
    """A model and what was done to it.

    Attributes:
        model: Embedded name, hub id, file or folder.
        merging: Name of each method to its knobs.
        quantization: Name of each method to its knobs.
        attention: Kernel, or None for the default.
        control: ``frame-only`` cuts global attention to frames, to see whether a score notices; None changes nothing.
        device, dtype: Where, and in which type, the model runs.
        resize: False feeds photographs as they are stored.
    """

    model: str
    merging: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quantization: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attention: str | None = None
    control: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    resize: bool = True

    @property
    def dense(self) -> Job:
        """The same model with nothing done to it but the kernel."""
        return dataclasses.replace(self, merging={}, quantization={}, control=None)

    @property
    def accelerated(self) -> bool:
        """Whether anything is done that the dense model does not do."""
        return self != self.dense

    def describe(self) -> dict[str, Any]:
        """Everything that changes a prediction, for :class:`geoaccel.eval.run.store.Store`; files by what they hold."""
        described = {**dataclasses.asdict(self), "weights": fingerprint(self.model), "geoaccel": geoaccel.__version__}
        files = {
            f"{name}.{knob}": _of_file(Path(value).expanduser())
            for name, knobs in (*self.merging.items(), *self.quantization.items())
            for knob, value in knobs.items()
            if isinstance(value, str | os.PathLike) and Path(value).expanduser().is_file()
        }
        # Absent where there are none: what was predicted before this was looked at stays valid.
        return described | ({"files": files} if files else {})

    def methods(self) -> tuple[list[Merging], list[Quantization]]:
        """The merging and the quantization methods with their knobs.

        Raises:
            ValueError: For a name that there is not, or a knob that is out of its range.
        """
        return (
            [make(MERGING, name, knobs) for name, knobs in self.merging.items()],
            [make(QUANTIZATION, name, knobs) for name, knobs in self.quantization.items()],
        )

    def build(self) -> nn.Module:
        """Load the model and put the methods in."""
        model = load_model(self.model, device=self.device, dtype=getattr(torch, self.dtype))
        return self.apply(model)

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the methods into a model that is loaded already."""
        methods, quantizations = self.methods()
        model = geoaccel.accelerate(model, merging=methods, quantization=quantizations, attention=self.attention)
        if quantizations:
            assert_quantized(model, *quantizations)
        if self.control is not None:
            place_mixer(model, FrameOnly())
        return model


class Predictor:
    """A loaded model that predicts one scene after the other."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.build()

    def load(self, scene: EvalScene) -> tuple[Tensor, list[ImageTransform]]:  # [1, S, 3, H, W]
        """A scene's photographs as the network wants them, on its device."""
        preprocess: Any = self.model.preprocess
        images, transforms = network_input(scene, preprocess, resize=self.job.resize)
        return images.to(self.job.device), transforms

    @torch.inference_mode()
    def __call__(self, scene: EvalScene) -> Prediction:
        """Predict one scene.

        Raises:
            ValueError: If the photographs cannot be used, or the model answers with numbers that are not finite.
        """
        stamps = photographs(scene)  # before they are read: one that changes meanwhile is noticed later
        images, transforms = self.load(scene)
        backbone: Any = self.model.backbone
        geometry = backbone.geometry(self.model(images), tuple(images.shape[-2:]))
        for name, tensor in vars(geometry).items():
            if not tensor.isfinite().all():
                raise UserError(f"the model predicted NaN or infinite numbers ({name})")
        names = tuple(frame.name for frame in scene.frames)
        return Prediction(geometry, names, transforms, effective_ratio(self.model), stamps)


def photographs(scene: EvalScene) -> Photographs:
    """What tells that photographs were replaced under the same names, without reading them.

    Raises:
        OSError: If one is not there.
    """
    stats = [path.stat() for path in scene.image_paths]
    return tuple((found.st_size, found.st_mtime_ns) for found in stats)


def fingerprint(model: str) -> str:
    """A short hash of all that a checkpoint file holds: other weights under the same name are noticed.

    Two safetensors files of the same tensors and metadata share it, in whatever order their headers name them.
    """
    return _of_file(resolve(model))


def _of_file(path: Path) -> str:
    changed = path.stat()
    return _digest(path, changed.st_size, changed.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file; its size and the time of its last change tell the cache when to read it anew."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header = file.read(min(size, int.from_bytes(file.read(8), "little")))
            # Metadata is written in an order drawn anew for every file. What is no header is for the reader to refuse.
            with suppress(ValueError):
                header = json.dumps(json.loads(header), sort_keys=True).encode()
            digest.update(header)
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
