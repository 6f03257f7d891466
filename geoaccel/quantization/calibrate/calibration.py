"""Calibration of quantized checkpoints on images: the steps between opening a network and quantizing it.

First scales: searched layer by layer (AWQ), without camera and register tokens in the statistics, or by the outputs
of the network. Then rounding, front to back, compensated inside each layer (GPTQ). Then, if requested, a compensation
token for the camera head, which is kept only if it brings cameras closer to the dense ones on held-out images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_networks, of_others
from geoaccel.precision import cast
from geoaccel.quantization.calibrate.clip import Clip, in_order
from geoaccel.quantization.calibrate.compensation import add_token, can_compensate, mean_camera_token
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.calibrate.rounding import quantize_compensated
from geoaccel.quantization.calibrate.search import Scales, TaskSearch, Track, scale_activations, silently
from geoaccel.quantization.calibrate.task import task_terms
from geoaccel.quantization.method import Quantization
from geoaccel.quantization.swap import quantize

TOKEN_CLIPS = "the camera token is judged on other clips than it is made from: give at least 2 scenes"


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibration.

    Args:
        patches_only: Leave camera and register tokens out of the statistics.
        scales: Search scales before rounding.
        task: Search them by the outputs of the network; None searches by the error of each layer alone, which takes a
            tenth of the time and, before compensated rounding, was as good (``benchmarks/quantization-*.md``).
        compensate: Round so that errors make up for each other, where a method can; otherwise to nearest.
        camera_token: Try the compensation token.
        device: Where the network runs during calibration.
    """

    patches_only: bool = True
    scales: bool = True
    task: TaskSearch | None = None
    compensate: bool = True
    camera_token: bool = False
    device: str = "cpu"

    def rounding(self, methods: Sequence[Quantization]) -> str:
        """``compensated``, or ``nearest`` if requested or if no method can use the inputs of a layer."""
        return "compensated" if self.compensate and any(method.uses_gram for method in methods) else "nearest"

    def check(self, methods: Sequence[Quantization]) -> None:
        """Refuse a calibration that would not use its images.

        Raises:
            ValueError: If the result would be the same as without data.
        """
        if self.scales or self.camera_token or self.rounding(methods) == "compensated":
            return
        names = " and ".join(dict.fromkeys(method.name for method in methods))
        why = f", which {names} cannot do," if self.compensate else ""
        raise UserError(
            f"without scales and without compensated rounding{why} there is nothing to calibrate; quantize without data"
        )

    def describe(self, methods: Sequence[Quantization]) -> dict[str, Any]:
        """The calibration of these methods as plain data."""
        search = "awq" if self.task is None else "task"
        return {
            "search": search if self.scales else "none",
            "patches_only": self.patches_only,
            "task": None if self.task is None else asdict(self.task),
            "rounding": self.rounding(methods),
        }


def calibrate(
    network: nn.Module,
    methods: Sequence[Quantization],
    calibration: Calibration,
    clips: Sequence[Clip],
    *,
    scenes: Mapping[str, Any],
    weights: str = "",
    folder: str | Path | None = None,
    track: Track[Any] = silently,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Quantize a float network for the images of a calibration set, in place.

    Args:
        network: The float network.
        methods: Methods for different layers.
        calibration: The settings.
        clips: The images.
        scenes: Identity of these images, as plain data; recorded in the provenance.
        weights: Identity of this checkpoint, so that unfinished work is not mixed up.
        folder: Where unfinished work is kept, for the same call to resume; None keeps nothing.
        track: Iterates over the steps, with a progress bar.
        report: Called with a line of text at each step.

    Returns:
        Provenance of the result.

    Raises:
        ValueError: If there is nothing to calibrate, or the calibration set is empty or does not fit the network.
    """
    calibration.check(methods)
    if calibration.camera_token and not can_compensate(network):
        raise UserError(
            f"a {type(network).__name__} has no camera head that attends across frames; leave out the camera token"
        )
    if calibration.camera_token and len(clips) < 2:
        raise UserError(TOKEN_CLIPS)
    described = {**calibration.describe(methods), **scenes}
    settings = {**described, "methods": [str(method) for method in methods], "weights": weights}
    settings["code"] = of_networks()
    settings["packages"] = of_others(map(type, [network, *methods]))
    settings["clips"] = in_order(clips)
    progress = None if folder is None else Progress(folder, settings)
    if progress is not None and progress.read("scales"):
        report(f"resuming; {len(progress.read('scales')['exponents'])} layers are done")
    cast(network, torch.float32).to(calibration.device)
    dense = copy.deepcopy(network) if calibration.camera_token else None
    batches = [_on(clip, calibration.device) for clip in clips]
    found = Scales([])
    if calibration.scales:
        found = scale_activations(
            network,
            methods,
            batches,
            patches_only=calibration.patches_only,
            task=calibration.task,
            progress=progress,
            track=track,
            report=report,
        )
    gains: dict[str, float] = {}
    if calibration.rounding(methods) == "compensated":
        gains = quantize_compensated(
            network,
            methods,
            batches,
            patches_only=calibration.patches_only,
            progress=progress,
            track=track,
            report=report,
        )
    else:
        quantize(network, *methods)
    if dense is not None:
        described["camera_token"] = try_token(network, dense, batches, report=report)
    network.to("cpu")
    return {"calibration": {**described, **_summary(found, gains)}}


@torch.no_grad()
def try_token(
    network: nn.Module,
    dense: nn.Module,
    batches: Sequence[Callable[[], torch.Tensor]],
    *,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compute the compensation token from half of the batches, and keep it if it helps on the others.

    Args:
        network: Quantized; gets the token if it helps.
        dense: The network before calibration.
        batches: At least two.
        report: Called with a line of text.

    Returns:
        ``kept``, and the camera term on the other half ``without`` and ``with`` it.
    """
    token = mean_camera_token(dense, batches[::2])
    judged = batches[1::2]
    truth = [_geometry(dense, load) for load in judged]

    def camera_term(model: nn.Module) -> float:
        terms = (task_terms(_geometry(model, load), t) for load, t in zip(judged, truth, strict=True))
        return sum(term["camera"] for term in terms) / len(judged)

    without = camera_term(network)
    trial = copy.deepcopy(network)
    add_token(trial, token)
    added = camera_term(trial)
    if added < without:
        add_token(network, token)
    report(f"camera token: {added:.2e} with it, {without:.2e} without; {'kept' if added < without else 'left out'}")
    return {"kept": added < without, "with": added, "without": without}


def _geometry(model: nn.Module, load: Callable[[], torch.Tensor]) -> Geometry:
    network: Any = model
    images = load()
    return network.backbone.geometry(network(images), tuple(images.shape[-2:]))


def _on(clip: Clip, device: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        images = clip.load()
        if not images.isfinite().all():
            raise UserError(f"images of {clip.name} contain NaN or infinite values; leave them out")
        return images.to(device)

    return load


def _summary(found: Scales, gains: Mapping[str, float]) -> dict[str, Any]:
    scalings = found.scalings
    notes: dict[str, Any] = {"exponents": {scaling.fold.linear: scaling.exponent for scaling in scalings}}
    if scalings:
        notes["mean_error_over_unscaled"] = round(sum(scaling.error for scaling in scalings) / len(scalings), 4)
    if gains:
        notes["mean_error_over_nearest"] = round(sum(gains.values()) / len(gains), 4)
    return {**notes, "scaled_layers": len(scalings), "task_terms": found.terms}
