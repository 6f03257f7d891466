"""One change of a network at a time, compared with the dense network's outputs; measurements are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from geoaccel.api import accelerate
from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.calibration import predict
from geoaccel.eval.metrics.effects import effects
from geoaccel.eval.tuning.choices import acting
from geoaccel.merging.layers import Layers, plain
from geoaccel.merging.method import AttentionMerging
from geoaccel.quantization.calibrate.allocation import to_records
from geoaccel.quantization.calibrate.clip import Clip
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.method import Quantization

Errors = dict[str, float]
NAMES = ("pose_deg", "depth_rel", "points")


@dataclass(frozen=True)
class Change:
    """A change of a network.

    Attributes:
        layers: Method of each layer of global attention; empty: none.
        quantization: Methods with the names of their layers.
    """

    layers: tuple[AttentionMerging | None, ...] = ()
    quantization: tuple[Quantization, ...] = ()

    def words(self) -> str:
        """Canonical text of the change."""
        return json.dumps([[plain(method) for method in self.layers], to_records(self.quantization)], sort_keys=True)

    def put_into(self, model: nn.Module) -> None:
        """Apply the change to a network without bypass; replaces an earlier change."""
        chosen = Layers(tuple((layer, layer, acting(method)) for layer, method in enumerate(self.layers)))
        accelerate(model, layers=chosen, quantization=list(self.quantization), keep_original=True)


@dataclass
class Trials:
    """Measures changes on clips.

    Attributes:
        model: Float model in eval mode; dense again after every trial.
        clips: Clips by name of the set.
        progress: Where errors are saved; existing ones are not measured again.
        found: Errors by set and change; given ones are not measured again either.
        measured: Number of trials run here.
    """

    model: nn.Module
    clips: Mapping[str, Sequence[Clip]]
    progress: Progress | None = None
    found: dict[str, Errors] = field(default_factory=dict)
    measured: int = 0
    _dense: dict[str, list[Geometry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found |= (None if self.progress is None else self.progress.read("errors")) or {}

    def errors(self, change: Change, clips: str) -> Errors:
        """Mean errors over the clips of one set; infinite where the output is not finite.

        Raises:
            ValueError: If the dense network's output is not finite.
        """
        key = f"{clips} {change.words()}"
        if key not in self.found:
            if clips not in self._dense:
                self._dense[clips] = [predict(self.model, clip) for clip in self.clips[clips]]
            change.put_into(self.model)
            try:
                rows = [
                    errors_of(predict(self.model, clip), dense)
                    for clip, dense in zip(self.clips[clips], self._dense[clips], strict=True)
                ]
                self.found[key] = {name: sum(row[name] for row in rows) / len(rows) for name in NAMES}
            except UserError:  # NaN: cannot be chosen
                self.found[key] = dict.fromkeys(NAMES, math.inf)
            finally:
                accelerate(self.model)
            self.measured += 1
            if self.progress is not None:
                self.progress.write("errors", self.found)
        return self.found[key]


@torch.no_grad()
def errors_of(changed: Geometry, dense: Geometry) -> Errors:
    """Distance of the output for one scene of two or more frames from the dense network's.

    Returns:
        ``pose_deg``, median over pairs of frames of the larger of the angles of rotation and translation;
        ``depth_rel``, mean relative difference of the depth; ``points``, mean distance over the size of the scene.
    """
    found = effects(changed, dense, None)
    return {"pose_deg": found["pose_median_deg"], "depth_rel": found["depth_rel"], "points": found["points"]}


def fresh(errors: Any) -> Errors:
    """Errors rounded to significant digits."""
    return {name: float(f"{value:.4g}") for name, value in errors.items()}
