"""Scales for a whole network: layer by layer on the error of each, or front to back on the outputs of the network.

The second is the search of QVGGT (Pan et al., CVPR 2026, arXiv 2605.31124): blocks in execution order, earlier ones
quantized and later ones float; for every layer the few candidates with the smallest layer error are tried in the
network, and the one with the smallest sum of that error and :func:`.task.task_terms` is kept.
Differs from the paper in: the order, the shortlist and the normalised error of the layer (over its squared output) are
ours, as the paper does not say; targets are the dense model's outputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.quantization.calibrate.awq import Fold, Scaling, apply_scale, find_folds, rank
from geoaccel.quantization.calibrate.blocks import blocks_of, running_order
from geoaccel.quantization.calibrate.prefix import Batch, Prefix
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.calibrate.statistics import InputStatistics, collect
from geoaccel.quantization.calibrate.task import TaskWeights, task_terms
from geoaccel.quantization.method import Quantization, scope_of
from geoaccel.quantization.swap import float_linears, owners

Item = TypeVar("Item")
Track = Callable[[Iterable[Item], str, int], Iterable[Item]]
"""Goes over items, of which there are so many, and shows how far it is."""


def silently(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Shows no progress."""
    return items


@dataclass(frozen=True)
class TaskSearch:
    """Search of scales by the outputs of the network.

    Attributes:
        weights: Weights of the terms.
        shortlist: Candidates tried for each layer, in addition to no scales.
    """

    weights: TaskWeights = field(default_factory=TaskWeights)
    shortlist: int = 4

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise UserError(f"shortlist={self.shortlist} is too small; give at least 1 candidate")


@dataclass(frozen=True)
class Scales:
    """Result of a search.

    Attributes:
        scalings: Scaling of each layer, in the order of the choices.
        terms: Task terms with everything rounded to nearest (``rounded``) and with the scales (``scaled``); empty for a
            search by layer errors.
    """

    scalings: list[Scaling]
    terms: dict[str, dict[str, float]] = field(default_factory=dict)


def scale_activations(
    model: nn.Module,
    methods: Quantization | Sequence[Quantization],
    batches: Sequence[Batch],
    *,
    patches_only: bool = True,
    task: TaskSearch | None = None,
    progress: Progress | None = None,
    track: Track[Any] = silently,
    report: Callable[[str], None] = lambda line: None,
) -> Scales:
    """Choose scales for the layers to be quantized, and fold them in; in place, before quantization.

    Args:
        model: Float; its outputs change only by rounding.
        methods: Methods that will quantize it.
        batches: Each returns images [B, S, 3, H, W] in [0, 1], preprocessed for the model.
        patches_only: Leave camera and register tokens out of the statistics.
        task: Choose by the outputs of the network; None chooses by the error of each layer alone.
        progress: Stores finished steps, which are not repeated.
        track: Iterates over batches and layers, with a progress bar.
        report: Called with a line of text for each layer.

    Raises:
        ValueError: If there are no images, or no layer that can be scaled.
    """
    linears = float_linears(model)
    methods = [methods] if isinstance(methods, Quantization) else list(methods)
    owner = owners(linears, methods, scope_of(model))
    folds = {fold.linear: fold for fold in find_folds(model) if fold.linear in owner}
    if not folds:
        names = ", ".join(map(str, methods))
        raise UserError(
            f"none of the {len(owner)} layers that {names} quantizes can be scaled (first: {next(iter(owner))}); "
            "scales exist for attn.qkv, attn.proj, mlp.fc1, mlp.w12 and mlp.w3 of transformer blocks: quantize some of "
            "these, too, or calibrate without scales (--search none)"
        )
    if task is not None:
        # They are asked for hundreds of times; the dense outputs, which are kept too, are larger.
        batches = [functools.cache(load) for load in batches]
    tracked = track(batches, "activations", len(batches))
    statistics = collect(model, list(folds), tracked, patches_only=patches_only, progress=progress)
    ledger = _Ledger(progress, report)
    if task is None:
        scalings = []
        for name in track(folds, "scales", len(folds)):
            choices = rank(linears[name], statistics[name], owner[name], folds[name])
            scaling = ledger.decided(choices) or ledger.decide(choices[0], {})
            apply_scale(model, folds[name], scaling.scale)
            scalings.append(scaling)
        return Scales(scalings)
    return _TaskRun(model, owner, folds, statistics, batches, task, ledger).run(track)


class _Ledger:
    """The decisions so far."""

    def __init__(self, progress: Progress | None, report: Callable[[str], None]) -> None:
        self.progress = progress
        self.report = report
        kept = None if progress is None else progress.read("scales")
        self.notes: dict[str, Any] = kept or {"exponents": {}, "terms": {}}

    def decided(self, choices: Sequence[Scaling]) -> Scaling | None:
        """The scales chosen before an interruption."""
        exponent = self.notes["exponents"].get(choices[0].fold.linear)
        return next((scaling for scaling in choices if scaling.exponent == exponent), None)

    def decide(self, scaling: Scaling, terms: Mapping[str, float]) -> Scaling:
        """Record a choice."""
        name = scaling.fold.linear
        self.notes["exponents"][name] = scaling.exponent
        if self.progress is not None:
            self.progress.write("scales", self.notes)
        values = "".join(f", {term} {value:.2e}" for term, value in terms.items())
        self.report(f"{name}: exponent {scaling.exponent:.2f}, error x {scaling.error:.3f}{values}")
        return scaling

    def terms(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Terms of the task, measured once."""
        if name not in self.notes["terms"]:
            self.notes["terms"][name] = measure()
            if self.progress is not None:
                self.progress.write("scales", self.notes)
        return self.notes["terms"][name]


class _TaskRun:
    """A search from front to back.

    ``model`` stays float and gets the scales; ``trial`` is its copy, quantized up to the present layer. Weights
    of the copy are rounded but not packed: the same numbers, without decoding on every call.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: Mapping[str, Quantization],
        folds: Mapping[str, Fold],
        statistics: Mapping[str, InputStatistics],
        batches: Sequence[Batch],
        task: TaskSearch,
        ledger: _Ledger,
    ) -> None:
        self.model, self.owner, self.folds, self.statistics = model, owner, folds, statistics
        self.task, self.ledger = task, ledger
        trunk, behind = running_order(model, batches[0]())
        self.order = [*trunk, *behind]
        self.trunk = set(trunk)
        self.dense = [_geometry(model, images, output) for images, output in Prefix(model, [], batches).forwards()]
        self.trial = copy.deepcopy(model)
        self.prefix = Prefix(self.trial, trunk, batches)

    def run(self, track: Track[Any]) -> Scales:
        rounded = self.ledger.terms("rounded", self._all_rounded)
        scalings = []
        layers = blocks_of(self.owner)
        for block in track(self.order, "blocks", len(self.order)):
            names = layers.get(block, [])
            for name in names:
                if name in self.folds:
                    scalings.append(self._choose(name))
                else:
                    self._round(name)
            if block in self.trunk:
                self.prefix.advance()
        return Scales(scalings, {"rounded": rounded, "scaled": self.ledger.terms("scaled", self._terms)})

    def _choose(self, name: str) -> Scaling:
        fold = self.folds[name]
        linear: Any = self.model.get_submodule(name)
        choices = rank(linear, self.statistics[name], self.owner[name], fold)
        scaling = self.ledger.decided(choices)
        if scaling is None:
            best: tuple[float, Scaling, dict[str, float]] | None = None
            plain = [scaling for scaling in choices[self.task.shortlist :] if scaling.exponent == 0]
            for choice in (*choices[: self.task.shortlist], *plain):
                undo = self._put_in(choice)
                terms = self._terms()
                undo()
                loss = choice.relative + self.task.weights.total(terms)
                if best is None or loss < best[0]:
                    best = loss, choice, terms
            assert best is not None
            scaling = self.ledger.decide(best[1], best[2])
        self._put_in(scaling)
        apply_scale(self.model, fold, scaling.scale)
        return scaling

    def _put_in(self, scaling: Scaling) -> Callable[[], None]:
        """Scale and round one layer of the copy; calling the result undoes it."""
        fold = scaling.fold
        before = []
        for name in (fold.linear, fold.source):
            module = self.trial.get_submodule(name)
            for part in PARAMETERS:
                before.append((module, part, getattr(module, part)))
                # The source may be rounded already, and is rounded anew with its new scale.
                setattr(module, part, getattr(self.model.get_submodule(name), part))
        apply_scale(self.trial, fold, scaling.scale)
        for name in (fold.linear, fold.source):
            if name in self.owner:
                self._round(name)

        def undo() -> None:
            for module, part, parameter in before:
                setattr(module, part, parameter)

        return undo

    def _round(self, name: str) -> None:
        linear: Any = self.trial.get_submodule(name)
        linear.weight = _rounded(linear.weight, self.owner[name])

    def _all_rounded(self) -> dict[str, float]:
        """The terms without any scales."""
        before = {name: self.trial.get_submodule(name).weight for name in self.owner}
        for name in self.owner:
            self._round(name)
        terms = self._terms()
        for name, weight in before.items():
            linear: Any = self.trial.get_submodule(name)
            linear.weight = weight
        return terms

    def _terms(self) -> dict[str, float]:
        """Mean of the terms over the batches."""
        total: dict[str, float] = {}
        for (images, output), dense in zip(self.prefix.forwards(), self.dense, strict=True):
            for name, value in task_terms(_geometry(self.trial, images, output), dense).items():
                total[name] = total.get(name, 0.0) + value / len(self.dense)
        return total


PARAMETERS = ("weight", "bias")


@torch.no_grad()
def _rounded(weight: Tensor, method: Quantization) -> nn.Parameter:
    rounded = method.round_trip(weight.detach().float()).to(weight.dtype)
    return nn.Parameter(rounded, requires_grad=weight.requires_grad)


def _geometry(model: nn.Module, images: Tensor, predictions: Mapping[str, Tensor]) -> Geometry:
    network: Any = model
    height, width = images.shape[-2:]
    return network.backbone.geometry(predictions, (height, width))
