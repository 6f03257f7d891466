"""Compares an accelerated model with the dense one on one scene, frame by frame and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geoaccel.atomic import write_bytes
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics.fidelity import capture_layers, fidelity_per_frame, layer_fidelity
from geoaccel.eval.report.layers import plot_layers
from geoaccel.eval.report.style import png
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.made_by import write_record

LAYERS = "layers.json"
PLOT = "layers.png"


@torch.inference_mode()
def compare_layers(job: Job, scene: EvalScene) -> dict[str, Any]:
    """Run the dense and the accelerated model on one scene.

    Args:
        job: The model and its methods.
        scene: The scene.

    Returns:
        ``scene``; ``layers``, the cosines of :func:`geoaccel.eval.metrics.fidelity.layer_fidelity` after every block,
        in execution order; ``frames``, the values of
        :func:`geoaccel.eval.metrics.fidelity.fidelity_per_frame`.
    """
    predictor = Predictor(job.dense)
    images, _ = predictor.load(scene)
    size = (images.shape[-2], images.shape[-1])
    model: Any = predictor.model
    with capture_layers(model) as layers:
        dense = model.backbone.geometry(model(images), size)
    model = Predictor(job).model if job.quantizes else job.apply(model)
    with layer_fidelity(model, layers) as rows:
        accelerated = model.backbone.geometry(model(images), size)
    names = [frame.name for frame in scene.frames]
    frames = [
        {"frame": name, **values} for name, values in zip(names, fidelity_per_frame(accelerated, dense), strict=True)
    ]
    return {"scene": scene.name, "layers": rows, "frames": frames}


def write_layers(folder: str | Path, found: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Write ``layers.png`` and, last, ``layers.json`` with its provenance."""
    write_bytes(Path(folder) / PLOT, png(plot_layers(found)))
    write_record(Path(folder) / LAYERS, made, found)
