"""Sensitivity of blocks to quantization: each measured alone, on images, with intervals and controls.

A ranking of blocks can be noise. So protecting the top-ranked blocks is compared, on held-out scenes, with protecting
as many bytes of random blocks or of those with the largest weights; and the rank correlation of two halves of the
scenes tells whether other scenes would give the same ranking.

Stage S of QVGGT (Pan et al., CVPR 2026, arXiv 2605.31124).
Differs from the paper: the effect, its intervals, the controls and the allocation rule are ours, as the paper chooses
four blocks by hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.calibration import predict
from geoaccel.eval.metrics.confidence import spearman
from geoaccel.eval.metrics.effects import EFFECTS, effects, summary
from geoaccel.quantization.calibrate.allocation import (
    Allocation,
    Unit,
    by_worth,
    file_bytes,
    find_units,
    to_records,
    within_bytes,
    within_effect,
)
from geoaccel.quantization.calibrate.clip import Clip
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.calibrate.search import Track, silently
from geoaccel.quantization.method import Quantization
from geoaccel.quantization.swap import quantize, restore_linears
from geoaccel.registry import unknown

Rows = list[dict[str, float]]
DEFAULT_SHARE = 0.25


@dataclass(frozen=True)
class Sensitivity:
    """Settings of a sensitivity sweep.

    Args:
        low: Method of all blocks.
        high: Method of protected blocks; None keeps them float.
        rank_by: Effect used for ranking, a name from ``EFFECTS``.
        budget_bytes: Maximum size of the file; None with ``max_effect``, or for a quarter of the way from all low to
            all high.
        max_effect: Maximum sum of the effects of unprotected blocks.
        draws: Number of random controls.
    """

    low: Quantization
    high: Quantization | None = None
    rank_by: str = "pose_deg"
    budget_bytes: int | None = None
    max_effect: float | None = None
    draws: int = 3

    def __post_init__(self) -> None:
        if self.rank_by not in EFFECTS:
            raise UserError(unknown("effect", self.rank_by, list(EFFECTS)))
        if self.budget_bytes is not None and self.max_effect is not None:
            raise UserError("a budget in bytes and one in accuracy were both given; choose one")
        if self.max_effect is not None and self.max_effect < 0:
            raise UserError(f"max_effect={self.max_effect}: a budget in accuracy is 0 or more")
        if self.draws < 1:
            raise UserError(f"draws={self.draws}: give at least one random control")


def measure_sensitivity(
    model: nn.Module,
    settings: Sensitivity,
    clips: Sequence[Clip],
    *,
    progress: Progress | None = None,
    track: Track[Any] = silently,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Quantize each block alone, choose an allocation, and compare it with controls.

    Args:
        model: Float model in eval mode; restored afterwards.
        settings: What is measured.
        clips: Images, four clips or more of two frames or more.
        progress: Where measured rows are saved; existing ones are not measured again.
        track: Iterates over the blocks and the controls, with progress.
        report: Called with a line of text for each.

    Returns:
        A document for a JSON file: ``units`` with their ``effects``, ``uniform``, ``agreement``, ``controls``,
        ``allocation``.

    Raises:
        ValueError: If there are too few clips, true cameras are needed and missing, or the budget is too small.
    """
    if len(clips) < 4:
        raise UserError(f"{len(clips)} scenes are too few to rank blocks and check the ranking; give 4 or more")
    if settings.rank_by.startswith("auc") and any(clip.truth is None for clip in clips):
        raise UserError(f"{settings.rank_by} needs true cameras, which images in folders do not have")
    units = find_units(model, settings.low, settings.high)
    spare = _spare(model, settings, units)
    trials = _Trials(model, clips, progress)
    singles: dict[str, Rows] = {}
    for unit in track(units, "blocks", len(units)):
        singles[unit.name] = trials.rows(unit.name, [_alone(settings.low, unit)])
        report(f"{unit.name}: {settings.rank_by} {_mean(singles[unit.name], settings.rank_by):.4g}")
    first, second = (
        {name: _mean(rows[half::2], settings.rank_by) for name, rows in singles.items()} for half in (0, 1)
    )
    ranked = {name: _mean(rows, settings.rank_by) for name, rows in singles.items()}
    protected = _protect(settings, units, ranked, spare)
    groups = _controls(units, _protect(settings, units, first, spare), settings.draws)
    controls = []
    for name, group in track(groups.items(), "controls", len(groups)):
        rows = trials.rows(name, Allocation.of(units, settings.low, settings.high, group).methods())
        controls.append({"name": name, "protected": [unit.name for unit in group], "effects": summary(rows[1::2])})
        report(f"{name}: {settings.rank_by} {_mean(rows[1::2], settings.rank_by):.4g}")
    names = list(ranked)
    magnitude = {unit.name: unit.magnitude for unit in units}
    return {
        "quantization": to_records([settings.low])[0],
        "rank_by": settings.rank_by,
        "scenes": [clip.name for clip in clips],
        "units": [{**vars(unit), "effects": summary(singles[unit.name])} for unit in units],
        "agreement": {
            "halves_spearman": _spearman(first, second, names),
            "magnitude_spearman": _spearman(ranked, magnitude, names),
        },
        "controls": controls,
        "allocation": {
            "protected": [unit.name for unit in protected],
            "methods": to_records(Allocation.of(units, settings.low, settings.high, protected).methods()),
            "file_bytes": file_bytes(model, units, protected),
            "file_bytes_low": file_bytes(model, units),
            "predicted_effect": sum(max(0.0, ranked[unit.name]) for unit in units if unit not in protected),
        },
    }


class _Trials:
    """Compares several quantizations of the network with the dense one."""

    def __init__(self, model: nn.Module, clips: Sequence[Clip], progress: Progress | None) -> None:
        self.model, self.clips, self.progress = model, clips, progress
        self.found: dict[str, Rows] = (None if progress is None else progress.read("rows")) or {}
        self.dense: list[Geometry] = []

    def rows(self, name: str, methods: Sequence[Quantization]) -> Rows:
        """Effects on every clip."""
        if name not in self.found:
            if not self.dense:
                self.dense = [predict(self.model, clip) for clip in self.clips]
            quantize(self.model, *methods, keep_original=True)
            try:
                self.found[name] = [
                    effects(predict(self.model, clip), dense, None if clip.truth is None else clip.truth())
                    for clip, dense in zip(self.clips, self.dense, strict=True)
                ]
            finally:
                restore_linears(self.model)
            if self.progress is not None:
                self.progress.write("rows", self.found)
        return self.found[name]


def _alone(low: Quantization, unit: Unit) -> Quantization:
    return replace(low, include=unit.layers, exclude=())


def _spare(model: nn.Module, settings: Sensitivity, units: Sequence[Unit]) -> int:
    """Extra bytes available for protection."""
    least = file_bytes(model, units)
    if settings.budget_bytes is None:
        return int(DEFAULT_SHARE * sum(unit.high_bytes - unit.low_bytes for unit in units))
    if settings.budget_bytes < least:
        raise UserError(
            f"a budget of {settings.budget_bytes / 1e9:.4g} GB is less than the {least / 1e9:.4g} GB with all blocks "
            f"as {settings.low}; give more, or quantize more layers"
        )
    return settings.budget_bytes - least


def _protect(settings: Sensitivity, units: Sequence[Unit], ranked: Mapping[str, float], spare: int) -> tuple[Unit, ...]:
    order = by_worth(units, ranked)
    if settings.max_effect is not None:
        return within_effect(order, ranked, settings.max_effect)
    return within_bytes(order, spare)


def _controls(units: Sequence[Unit], protected: Sequence[Unit], draws: int) -> dict[str, tuple[Unit, ...]]:
    """Groups of blocks with the same protection bytes as those chosen on half of the scenes."""
    spare = sum(unit.high_bytes - unit.low_bytes for unit in protected)
    groups = {
        "nothing protected": (),
        "protected by sensitivity": tuple(protected),
        "protected by weight magnitude": within_bytes(sorted(units, key=lambda unit: -unit.magnitude), spare),
    }
    for draw in range(draws):
        groups[f"protected at random, draw {draw}"] = within_bytes(random.Random(draw).sample(units, len(units)), spare)
    return groups


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _spearman(a: Mapping[str, float], b: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Rank correlation; None if one side is constant."""
    sides = [torch.tensor([side[name] for name in names], dtype=torch.float64) for side in (a, b)]
    return None if any(side.min() == side.max() for side in sides) else spearman(*sides)
