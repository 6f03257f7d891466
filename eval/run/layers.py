"""Where an accelerated model drifts away from the dense one: one scene, frame by frame and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geoaccel.atomic import write_bytes
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics.fidelity import capture_layers, fidelity_per_frame, layer_fidelity
from geoaccel.eval.report.style import FAINT, INK, literal, new_figure, png, tidy
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.made_by import write_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = "layers.json"
PLOT = "layers.png"
# One colour each; they meet in this order in a forward.
KINDS = {"encoder": "#0072b2", "frame": "#e69f00", "global": "#d55e00"}


@torch.inference_mode()
def compare_layers(job: Job, scene: EvalScene) -> dict[str, Any]:
    """Run the dense and the accelerated model on one scene.

    Args:
        job: The model and its methods.
        scene: What it runs on.

    Returns:
        ``scene``; ``layers``, the cosines of :func:`geoaccel.eval.metrics.fidelity.layer_fidelity` behind every block,
        in the order in which blocks run; ``frames``, the values of
        :func:`geoaccel.eval.metrics.fidelity.fidelity_per_frame`.
    """
    predictor = Predictor(job.dense)
    images, _ = predictor.load(scene)
    size = (images.shape[-2], images.shape[-1])
    model: Any = predictor.model
    with capture_layers(model) as layers:
        dense = model.backbone.geometry(model(images), size)
    model = Predictor(job).model if job.quantization else job.apply(model)
    with layer_fidelity(model, layers) as rows:
        accelerated = model.backbone.geometry(model(images), size)
    names = [frame.name for frame in scene.frames]
    frames = [
        {"frame": name, **values} for name, values in zip(names, fidelity_per_frame(accelerated, dense), strict=True)
    ]
    return {"scene": scene.name, "layers": rows, "frames": frames}


def write_layers(folder: str | Path, found: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Write ``layers.png`` and, last, ``layers.json`` with what made it."""
    write_bytes(Path(folder) / PLOT, png(plot_layers(found)))
    write_record(Path(folder) / LAYERS, made, found)


def plot_layers(found: Mapping[str, Any]) -> Figure:
    """Distance from the dense tokens behind every block: 1 minus the cosine, its mean and its worst token."""
    figure = new_figure(7.2, 3.4)
    axes = figure.subplots()
    rows = list(enumerate(found["layers"]))
    for kind, color in KINDS.items():
        own = [(place, row) for place, row in rows if row["kind"] == kind]
        for statistic, look in (("mean", {"marker": "o"}), ("min", {"marker": "v", "alpha": 0.45})):
            name = f"{kind}, {'mean' if statistic == 'mean' else 'worst token'}"
            values = [1 - row[f"fidelity_cosine_{statistic}"] for _, row in own]
            axes.plot(
                [place for place, _ in own], values, color=color, linestyle="none", markersize=4.5, label=name, **look
            )
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    axes.set_xlabel("block, in the order of the forward", color=INK, fontsize=9.5)
    axes.set_ylabel("1 - cosine to the dense token", color=INK, fontsize=9.5)
    axes.set_title(literal(found["scene"]), fontsize=10, color=INK, loc="left")
    tidy(axes)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
