"""Ablation of calibration: one row per step, all on the same scenes, over several calibration sets.

| row | weights | scales | images |
|---|---|---|---|
| ``rtn`` | 4 bits, rounded to nearest | none | none |
| ``awq`` | the same | error of each layer, all tokens | of the seed |
| ``filter`` | the same | error of each layer, patches only | of the seed |
| ``task`` | the same | outputs of the network, patches only | of the seed |
| ``rounding`` | 4 bits, compensated rounding (GPTQ) | as ``task`` | of the seed |
| ``mixed`` | as ``rounding``, blocks protected in FP8 by their sensitivity | as ``task`` | of the seed |
| ``default`` | as ``rounding`` | as ``filter``; what ``geoaccel quantize calibrate`` does | of the seed |
| ``rounding-only`` | as ``rounding`` | none | of the seed |
| ``rtn-32`` | 4 bits, groups of 32, rounded to nearest | none | none |

The last two are controls: for the scales, and for ``mixed``, with more bits everywhere and no calibration. A seed
determines the rendered calibration scenes; every row is evaluated on the first validation scenes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.calibration import CalibrationScenes, predict, rendered_clip
from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, TEST_SEEDS
from geoaccel.eval.metrics.effects import EFFECTS, effects, for_json, interval, with_interval
from geoaccel.eval.tools.sensitivity import Sensitivity, measure_sensitivity
from geoaccel.quantization import (
    FP8,
    W4A16,
    Quantization,
    TaskSearch,
    quantize,
    quantize_compensated,
    quantized_parts,
    scale_activations,
)
from geoaccel.quantization.calibrate.allocation import from_records
from geoaccel.quantization.calibrate.clip import Clip
from geoaccel.quantization.calibrate.progress import Progress

ROWS = ("rtn", "awq", "filter", "task", "rounding", "mixed", "default", "rounding-only", "rtn-32")
WITHOUT_DATA = ("rtn", "rtn-32")
BASELINES = ("rtn", "awq")
TITLES = {
    "rtn": "rounded to nearest",
    "awq": "AWQ",
    "filter": "+ token filter",
    "task": "+ task-aware search",
    "rounding": "+ compensated rounding",
    "mixed": "+ mixed precision",
    "default": "AWQ, token filter, compensated rounding",
    "rounding-only": "control: compensated rounding, no scales",
    "rtn-32": "control: rounded, groups of 32",
}
SEED_STEP = 100_000_000
SHOWN = {
    "auc_30_loss": "loss of AUC@30",
    "auc_5_loss": "loss of AUC@5",
    "pose_deg": "cameras, degrees",
    "depth_rel": "depth, relative",
    "points": "points / scene size",
}


@dataclass(frozen=True)
class Ablation:
    """Sizes of the measurement.

    Args:
        scenes, frames: Validation scenes, and images per scene.
        seeds: Calibration sets.
        calibration_scenes, calibration_frames: Scenes per calibration set, and images per scene.
        sensitivity_scenes: Scenes per set on which blocks are ranked.
        shortlist: Scales tried per layer.
        rows: Rows of the table to measure.
    """

    scenes: int = 64
    frames: int = 8
    seeds: int = 5
    calibration_scenes: int = 4
    calibration_frames: int = 4
    sensitivity_scenes: int = 8
    shortlist: int = 4
    rows: tuple[str, ...] = ROWS

    def __post_init__(self) -> None:
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown or not self.rows:
            raise UserError(f"rows={' '.join(self.rows)}: choose from {', '.join(ROWS)}")
        if not 1 <= self.scenes <= len(TEST_SEEDS):
            raise UserError(f"scenes={self.scenes}: give 1 to {len(TEST_SEEDS)} validation scenes")
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}: give at least one calibration set")
        if self.frames < 2 or self.calibration_frames < 2:
            raise UserError("cameras are compared in pairs: give 2 frames or more")


def run_ablation(
    model: nn.Module,
    ablation: Ablation,
    *,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every row on every calibration set.

    Args:
        model: Float model; not modified.
        ablation: Sizes.
        progress: Where measured rows are saved.
        report: Called with a line of text for each.

    Returns:
        A document for a JSON file and for :func:`ablation_table`.
    """
    network: Any = model
    size = (network.preprocess.size, network.preprocess.size)
    clips = [_kept(rendered_clip(seed, ablation.frames, size)) for seed in TEST_SEEDS[: ablation.scenes]]
    dense: list[Geometry] = []
    made = Rows(model, ablation)
    found: dict[str, Any] = (None if progress is None else progress.read("rows")) or {}
    for seed, name in _work(ablation):
        key = f"{name}/{seed}"
        if key in found:
            continue
        if not dense:
            dense.extend(predict(model, clip) for clip in clips)
        quantized, notes = made.make(name, seed)
        pairs = zip(clips, dense, strict=True)
        rows = [effects(predict(quantized, clip), d, clip.truth() if clip.truth else None) for clip, d in pairs]
        stored = sum(part.stored_bytes for part in quantized_parts(quantized))
        found[key] = {"effects": rows, "stored_bytes": stored, **notes}
        if progress is not None:
            progress.write("rows", found)
        mean = sum(row["pose_deg"] for row in rows) / len(rows)
        report(f"{TITLES[name]}, seed {seed}: cameras {mean:.3f} degrees from the dense ones")
    return {"settings": vars(ablation), "rows": _summaries(ablation, found), "runs": found}


class Rows:
    """Quantized copies of a model for the rows of the table.

    Args:
        model: Float model; not modified.
        ablation: Sizes.
    """

    def __init__(self, model: nn.Module, ablation: Ablation) -> None:
        self.model, self.ablation = model, ablation
        self.searched: tuple[int, nn.Module, dict[str, Any]] | None = None

    def make(self, name: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The network of one row and calibration set, and notes on how it was made."""
        low = W4A16(group_size=32) if name == "rtn-32" else W4A16()
        if name in WITHOUT_DATA:
            return quantize(copy.deepcopy(self.model), low), {}
        photographs = self._photographs(seed)
        batches = [functools.cache(clip.load) for clip in photographs.clips(self.model)]
        if name == "rounding-only":
            network = copy.deepcopy(self.model)
            quantize_compensated(network, low, batches)
            return network, {}
        if name in ("awq", "filter", "default"):
            network = copy.deepcopy(self.model)
            scale_activations(network, low, batches, patches_only=name != "awq")
            if name == "default":
                quantize_compensated(network, low, batches)
                return network, {}
            return quantize(network, low), {}
        network, notes = self._task_scaled(seed, low, batches)
        if name == "task":
            return quantize(network, low), notes
        methods: list[Quantization] = [low]
        if name == "mixed":
            ranking = replace(photographs, scenes=self.ablation.sensitivity_scenes)
            settings = Sensitivity(low=low, high=FP8(activations=False), draws=1)
            chosen = measure_sensitivity(network, settings, ranking.clips(network))["allocation"]
            methods = from_records(chosen["methods"])
            notes = {**notes, "protected": chosen["protected"]}
        quantize_compensated(network, methods, batches)
        return network, notes

    def _photographs(self, seed: int) -> CalibrationScenes:
        return CalibrationScenes(
            scenes=self.ablation.calibration_scenes,
            frames=self.ablation.calibration_frames,
            first_seed=FIRST_TRAIN_SEED + SEED_STEP * (1 + seed),
        )

    def _task_scaled(self, seed: int, low: Quantization, batches: Sequence[Any]) -> tuple[nn.Module, dict[str, Any]]:
        """A float copy with scales found by the output-based search; three rows share the search."""
        if self.searched is None or self.searched[0] != seed:
            network = copy.deepcopy(self.model)
            scales = scale_activations(network, low, batches, task=TaskSearch(shortlist=self.ablation.shortlist))
            self.searched = seed, network, {"task_terms": scales.terms}
        return copy.deepcopy(self.searched[1]), self.searched[2]


def _work(ablation: Ablation) -> Iterable[tuple[int, str]]:
    """Every row for every seed; rows without calibration data once."""
    for seed in range(ablation.seeds):
        for name in ablation.rows:
            if seed == 0 or name not in WITHOUT_DATA:
                yield seed, name


def _kept(clip: Clip) -> Clip:
    """Rendered once for all rows."""
    return replace(clip, load=functools.cache(clip.load))


def _summaries(ablation: Ablation, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Intervals over scenes and seeds; and of the differences to earlier rows, scene by scene."""

    def matrix(name: str, effect: str) -> torch.Tensor:  # [seeds, scenes]
        seeds = range(ablation.seeds) if name not in WITHOUT_DATA else [0] * ablation.seeds
        return torch.tensor([[row[effect] for row in found[f"{name}/{seed}"]["effects"]] for seed in seeds])

    def spread(values: torch.Tensor) -> dict[str, float | None]:
        return for_json(interval(values.tolist()))

    rows = []
    for name in ablation.rows:
        against = {
            other: {effect: spread(matrix(name, effect) - matrix(other, effect)) for effect in EFFECTS}
            for other in BASELINES
            if other != name and other in ablation.rows
        }
        sizes = [run["stored_bytes"] for key, run in found.items() if key.startswith(f"{name}/")]
        rows.append(
            {
                "row": name,
                "title": TITLES[name],
                "stored_bytes": sum(sizes) / len(sizes),
                "effects": {effect: spread(matrix(name, effect)) for effect in EFFECTS},
                "minus": against,
            }
        )
    return rows


def ablation_table(document: Mapping[str, Any], title: str, notes: Sequence[str]) -> str:
    """Two Markdown tables: effects, and differences to plain rounding and to plain AWQ."""
    settings = document["settings"]
    lines = [f"# {title}", "", *(f"- {note}" for note in notes)]
    lines += [
        f"- {settings['scenes']} validation scenes (seeds from {TEST_SEEDS[0]} on) of {settings['frames']} images; "
        f"{settings['seeds']} calibration sets of {settings['calibration_scenes']} scenes of "
        f"{settings['calibration_frames']} images",
        "- means, and 95 % intervals of the bootstrap over scenes and calibration sets; smaller is better everywhere",
    ]
    lines += ["", "## Effects", "", f"| | MB of weights | {' | '.join(SHOWN.values())} |", _rule(len(SHOWN) + 2)]
    for row in document["rows"]:
        cells = " | ".join(with_interval(row["effects"][effect], ".4f") for effect in SHOWN)
        lines.append(f"| {row['title']} | {row['stored_bytes'] / 1e6:.2f} | {cells} |")
    for other in [name for name in BASELINES if name in settings["rows"]]:
        lines += ["", f"## Differences to {TITLES[other]}", "", f"| | {' | '.join(SHOWN.values())} |"]
        lines.append(_rule(len(SHOWN) + 1))
        for row in document["rows"]:
            if other in row["minus"]:
                cells = " | ".join(with_interval(row["minus"][other][effect], ".4f") for effect in SHOWN)
                lines.append(f"| {row['title']} | {cells} |")
    return "\n".join(lines) + "\n"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
