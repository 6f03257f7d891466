"""A prediction job as plain data: it can be hashed, compared, written down and sent to another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.api import place_mixer
from geoaccel.attention import FrameOnly
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.made_by import PREDICTION, SEQUENCES, made_by
from geoaccel.eval.run.prepare import network_input
from geoaccel.eval.run.sequences import AutoLengths, Windows, lengths_of, predict_sequence
from geoaccel.eval.run.store import Prediction, photographs
from geoaccel.eval.run.token_effects import effective_key_ratio, effective_ratio
from geoaccel.fingerprint import of_file, of_files, of_json, of_others
from geoaccel.images import ImageTransform
from geoaccel.merging.layers import Layers
from geoaccel.merging.method import MERGING, Merging
from geoaccel.models.files import fingerprint
from geoaccel.models.weights import backbone_of, load_model, quantized_by
from geoaccel.quantization import QUANTIZATION, Quantization, assert_quantized
from geoaccel.registry import make
from geoaccel.tuned import TunedPlan
from geoaccel.windows.predict import Lengths

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
        layers: Methods of single layers of global attention, or a preset, see :mod:`geoaccel.merging.layers`.
        plan: A file of ``geoaccel tune``, in place of merging, layers and quantization.
        device, dtype: Where, and in which type, the model runs.
        resize: False feeds images as they are stored.
        windows: How whole sequences are cut and joined; None predicts each scene in one forward.
    """

    model: str
    merging: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quantization: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attention: str | None = None
    control: str | None = None
    layers: Mapping[Any, Any] | str | None = None
    plan: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    resize: bool = True
    windows: Windows | None = None

    @property
    def dense(self) -> Job:
        """The same model with nothing done to it but the kernel."""
        return dataclasses.replace(self, merging={}, quantization={}, control=None, layers=None, plan=None)

    @property
    def accelerated(self) -> bool:
        """Whether anything is done that the dense model does not do."""
        return self != self.dense

    @property
    def quantizes(self) -> bool:
        """Whether linears are quantized."""
        return bool(self.quantized_by)

    @property
    def quantized_by(self) -> list[str]:
        """Names of the methods that quantize linears, those of the plan included."""
        return list(dict.fromkeys([*self.quantization, *(method.name for method in self._planned[1])]))

    @property
    def held(self) -> str:
        """How the checkpoint itself is quantized; ``none`` where it is not."""
        return "+".join(dict.fromkeys(quantized_by(self.model))) or "none"

    @property
    def merges(self) -> list[str]:
        """What is done to global attention, in words."""
        named = [] if self.layers is None else [self.layers if isinstance(self.layers, str) else "layers"]
        return [*self.merging, *named, *([] if self.plan is None else [f"plan {Path(self.plan).stem}"])]

    @property
    def _planned(self) -> tuple[Sequence[Merging], Sequence[Quantization]]:
        """The methods that the plan names: of layers, and those that quantize."""
        if self.plan is None:
            return (), ()
        plan = TunedPlan.read(self.plan)
        return plan.layers.methods, plan.quantization

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of evaluation that decide what is predicted, as of :mod:`geoaccel.eval.run.made_by`."""
        return PREDICTION if self.windows is None else SEQUENCES

    def describe(self) -> dict[str, Any]:
        """Everything that changes a prediction, for :class:`geoaccel.eval.run.store.Store`; files by what they hold."""
        described = {**dataclasses.asdict(self), "weights": fingerprint(self.model)}
        for name in ("layers", "plan", "windows"):  # most runs have none
            if described[name] is None:
                del described[name]
        named: list[tuple[str, Any]] = [(method.name, method) for kind in self.methods() for method in kind]
        inner = [Layers.read(self.layers).methods, *self._planned]
        named += [(f"layers.{i}.{method.name}", method) for i, method in enumerate(chain(*inner))]
        files = {}
        if self.plan is not None:
            files["plan"] = of_file(Path(self.plan).expanduser())
        for name, method in named:
            files |= of_files(name, method)
        classes = [backbone_of(self.model).network, *(type(method) for _, method in named)]
        more = {"files": files, "packages": of_others(classes)}
        return described | {name: found for name, found in more.items() if found}

    def methods(self) -> tuple[list[Merging], list[Quantization]]:
        """The merging and the quantization methods with their knobs.

        Raises:
            ValueError: For a name that there is not, or a knob that is out of its range.
        """
        Layers.read(self.layers)
        if self.plan is not None:
            TunedPlan.read(self.plan)
            if self.merging or self.quantization or self.layers is not None:
                raise UserError(f"plan={self.plan} says what is done; leave out merging, layers and quantization")
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
        chosen: dict[str, Any] = {"merging": methods, "quantization": quantizations, "layers": self.layers}
        if self.plan is not None:
            chosen = {"plan": self.plan}
        model = geoaccel.accelerate(model, attention=self.attention, **chosen)
        if expected := [*quantizations, *self._planned[1]]:
            assert_quantized(model, *expected)
        if self.control is not None:
            place_mixer(model, FrameOnly())
        return model


def more_rows(settings: Mapping[str, Any]) -> tuple[Mapping[Any, Any] | str | None, str | None]:
    """The layers and the plan of a benchmark's settings, each a row of its table.

    Raises:
        ValueError: If either is not in order, or the plan quantizes.
    """
    layers, plan = settings["layers"], None if settings["plan"] is None else str(settings["plan"])
    Layers.read(layers)
    if plan is not None and TunedPlan.read(plan).quantization:
        raise UserError(
            f"plan={plan} quantizes, and bench times everything on one set of float weights; time it with "
            f"geoaccel eval plan={plan}"
        )
    return layers, plan


class Predictor:
    """A loaded model that predicts one scene after the other.

    Args:
        job: The model, and what is done to it.
        auto: Of the run, where the length of windows is left to the memory.
    """

    def __init__(self, job: Job, auto: AutoLengths | None = None) -> None:
        self.job, self.auto = job, auto
        self.made_by = made_by(job.device, job.modules)
        self.model = job.build()

    def load(self, scene: EvalScene) -> tuple[Tensor, list[ImageTransform]]:  # [1, S, 3, H, W]
        """A scene's images as the network wants them, on its device."""
        preprocess: Any = self.model.preprocess
        images, transforms = network_input(scene, preprocess, resize=self.job.resize)
        return images.to(self.job.device), transforms

    def fitting(self, scene: EvalScene) -> Lengths:
        """Windows that fit into the memory that is free here and now.

        Raises:
            ValueError: If the first image cannot be read, or no window fits.
        """
        assert self.job.windows is not None
        return lengths_of(self.model, scene, self.job.windows, resize=self.job.resize)

    def _auto(self, scene: EvalScene) -> Lengths | None:
        """What ``windows=auto`` takes in this run; this sequence decides it where none has yet."""
        if self.auto is not None and self.auto.read() is None:
            self.auto.keep(self.fitting(scene))
        return None if self.auto is None else self.auto.read()

    @torch.inference_mode()
    def __call__(self, scene: EvalScene, unfinished: Path | None = None) -> Prediction:
        """Predict one scene.

        Args:
            scene: The scene.
            unfinished: Where the windows of a sequence are while they come.

        Raises:
            ValueError: If the images cannot be used, or the model outputs numbers that are not finite.
        """
        stamps = photographs(scene)  # before they are read: one that changes meanwhile is noticed later
        names = tuple(frame.name for frame in scene.frames)
        if self.job.windows is not None:
            assert unfinished is not None
            auto = self._auto(scene)
            made = [self.made_by, None if auto is None else dataclasses.asdict(auto)]
            found, ratios = predict_sequence(
                self.model,
                scene,
                self.job.windows,
                resize=self.job.resize,
                out=unfinished / of_json(made),  # windows of another machine are not taken, as whole scenes are not
                auto=auto,
            )
            return Prediction(found, names, [], *ratios, stamps, self.made_by)
        images, transforms = self.load(scene)
        backbone: Any = self.model.backbone
        try:
            geometry = backbone.geometry(self.model(images), tuple(images.shape[-2:]))
        except torch.linalg.LinAlgError:  # a rotation may come of an SVD, which refuses such numbers
            raise UserError("the model predicted NaN or infinite numbers (cameras)") from None
        for name, tensor in vars(geometry).items():
            if not tensor.isfinite().all():
                raise UserError(f"the model predicted NaN or infinite numbers ({name})")
        ratios = effective_ratio(self.model), effective_key_ratio(self.model)
        return Prediction(geometry, names, transforms, *ratios, stamps, self.made_by)
