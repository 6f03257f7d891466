"""``geoaccel bench``: latency, memory and tokens of every method over frame counts, against the dense model.

Everything runs in one process on one set of weights; methods alternate, so a slowdown of the machine affects all of
them. Frames are those of a rendered scene, because merging depends on image content.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.api import describe
from geoaccel.console import counted, say, warn
from geoaccel.errors import UserError
from geoaccel.eval.bench.random_weights import random_full_size
from geoaccel.eval.bench.speed import MIN_REPEATS, compare, peak_memory
from geoaccel.eval.data.synthetic import sequence
from geoaccel.eval.report import Row, knobs_of
from geoaccel.eval.run.job import Job, more_rows
from geoaccel.eval.run.made_by import sitting
from geoaccel.eval.run.settings import methods_of, out_folder, refuse_given, section, usual_settings, whole_number
from geoaccel.eval.run.token_effects import all_dense, effects
from geoaccel.memory import GIB, check_memory
from geoaccel.merging.method import MERGING
from geoaccel.models import BACKBONES
from geoaccel.models.weights import load_model
from geoaccel.registry import check_knobs, make
from geoaccel.runtime import hardware, pick_device, pick_dtype, versions
from geoaccel.slots import Slots, fill_slots, filled_slots

DENSE = "none"

TOLERANCE = 0.15
"""Error of a predicted speedup above which it is reported."""


def listed(value: Any) -> list[Any]:
    """A list unchanged, a single value as a list: ``methods=httm`` is ``methods=[httm]``."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def frame_counts(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The frame counts of a benchmark's settings; also checks ``repeats``.

    Raises:
        ValueError: If either is invalid.
    """
    frames, repeats = tuple(listed(settings["frames"])), settings["repeats"]
    if not frames or any(type(count) is not int or count < 1 for count in frames):
        raise UserError(f"frames={list(frames)}: give a list of positive numbers, such as frames=[8,32]")
    if type(repeats) is not int or repeats < MIN_REPEATS:
        raise UserError(f"repeats={repeats}: give at least {MIN_REPEATS}")
    return frames


def method_knobs(names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each method with its knobs from a benchmark's settings.

    Raises:
        ValueError: For an unknown method or knob, or knobs of a method that is not measured.
    """
    given = settings["knobs"] or {}
    if not isinstance(given, Mapping) or any(not isinstance(knobs, Mapping) for knobs in given.values()):
        raise UserError(f"knobs={given}: give knobs of methods by name, such as knobs.httm.query_keep=0.4")
    for name in (*names, *given):
        MERGING[name]
    for name, knobs in given.items():
        if name not in names:
            raise UserError(f"knobs.{name} and methods=[{','.join(names)}]: add {name} to methods, or omit its knobs")
        check_knobs(MERGING, name, knobs)
    found = methods_of({name: given.get(name, {}) for name in names}, settings["ratio"])
    for name in names:
        if settings["methods"] is not None or name in given:  # other methods that cannot act are left out
            make(MERGING, name, found[name])
    return found


def frame_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) from a benchmark's settings; None for the model's default.

    Raises:
        ValueError: If it is neither a number nor two.
    """
    if settings["size"] is None:
        return None
    sides = listed(settings["size"])
    height, width = sides[0] if sides else 0, sides[-1] if sides else 0
    if not 1 <= len(sides) <= 2 or type(height) is not int or type(width) is not int:
        raise UserError(f"size={settings['size']}: give height and width, or one number for both: size=[224,280]")
    return height, width


def check_size(size: tuple[int, int], model: nn.Module) -> None:
    """Reject image sizes that are not multiples of the patch size.

    Raises:
        ValueError: Naming the patch size.
    """
    patch: int = model.preprocess.patch_size  # type: ignore[union-attr, assignment]
    if any(side < patch or side % patch for side in size):
        raise UserError(f"size={list(size)}: height and width must be multiples of {patch}, the patch size")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Settings of every benchmark.

    Attributes:
        frames: Frame counts.
        scene: Seed of the rendered scene.
        folder: Folder of the report.
        device, dtype: Device and dtype.
        repeats, warmup: Timed and untimed runs of each part at each frame count.
    """

    frames: tuple[int, ...]
    scene: int
    folder: Path
    device: str
    dtype: str
    repeats: int
    warmup: int

    @staticmethod
    def shared(settings: Mapping[str, Any]) -> dict[str, Any]:
        """All of these except the folder, checked.

        Raises:
            ValueError: For an invalid setting.
        """
        device = pick_device(settings["device"])
        return {
            "frames": frame_counts(settings),
            "scene": whole_number(settings, "scene", 0),
            "device": device,
            "dtype": pick_dtype(settings["dtype"], device, ask_processor=False),
            "repeats": settings["repeats"],
            "warmup": whole_number(settings, "warmup", 0),
        }


@dataclass(frozen=True, kw_only=True)
class Bench(Timed):
    """Methods against the dense model, checked.

    Attributes:
        model: A checkpoint, or the name of a backbone for random weights at full size.
        methods: Knobs by method name.
        all_methods: The methods were not requested by name: those that cannot act on this model are left out.
        attention: Kernel for all of them.
        heads: Heads to run; None for all.
        layers, plan: For two more rows, see :class:`geoaccel.eval.run.job.Job`; None: no such row.
        size: (H, W); None for the model's default square.
    """

    model: str
    methods: Mapping[str, Mapping[str, Any]]
    all_methods: bool
    attention: str | None
    heads: tuple[str, ...] | None
    layers: Mapping[Any, Any] | str | None
    plan: str | None
    size: tuple[int, int] | None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Bench:
        """Check settings of ``configs/bench.yaml``.

        Raises:
            ValueError: For an invalid setting; one line says which, and what is allowed.
        """
        usual, why = usual_settings("bench")["merge3d"], "is only for suite=merge3d; add that, or leave it out"
        refuse_given(section(settings, "merge3d"), usual, why, "merge3d.")
        names = list(MERGING) if settings["methods"] is None else listed(settings["methods"])
        methods = method_knobs(names, settings)
        size, shared = frame_size(settings), cls.shared(settings)
        model = str(settings["model"])
        layers, plan = more_rows(settings)
        default = f"{Path(model).stem}-{'x'.join(map(str, size or ()))}-{shared['dtype']}"
        return cls(
            model=model,
            methods=methods,
            all_methods=settings["methods"] is None,
            attention=settings["attention"],
            heads=None if settings["heads"] is None else tuple(listed(settings["heads"])),
            layers=layers,
            plan=plan,
            size=size,
            folder=out_folder(settings, Path("runs") / "bench" / default),
            **shared,
        )

    @property
    def checkpoint(self) -> str | None:
        """What is loaded; None for random weights."""
        return None if self.model in BACKBONES else self.model

    @property
    def title(self) -> str:
        """Title of the report."""
        return f"{self.model}, time and memory"

    @property
    def scored(self) -> str:
        """What was measured, in words."""
        return f"median of {self.repeats} alternating forwards, model only"

    @torch.inference_mode()
    def run(self, command: str) -> list[Row]:
        """Measure; one row per frame count and method."""
        model = self.load()
        preprocess: Any = model.preprocess
        size = self.size or (preprocess.size, preprocess.size)
        check_size(size, model)
        slots = self.slots(model)
        rows = []
        with counted(len(self.frames), "frame count") as bar:
            for count in self.frames:
                bar.set_postfix_str(f"{count} frames")
                rows += self.measure(model, slots, count, size, command)
                bar.update()
        return rows

    def slots(self, model: nn.Module) -> dict[str, Slots]:
        """Contents of the model's slots for the dense model and every method; warns of methods that cannot act."""
        slots = {DENSE: filled_slots(self.job({}).apply(model))}
        for name, knobs in self.methods.items():
            try:
                slots[name] = filled_slots(self.job({name: knobs}).apply(model))
            except UserError as error:
                if not self.all_methods:
                    raise
                warn(f"left out: {name}: {error}")
        for more in ({"layers": self.layers}, {"plan": self.plan}):
            if any(value is not None for value in more.values()):
                job = self.job({}, **more)
                slots[job.merges[0]] = filled_slots(job.apply(model))
        return slots

    def load(self) -> nn.Module:
        """The checkpoint, or random weights at full size."""
        if self.model in BACKBONES:
            return random_full_size(self.model, self.device, getattr(torch, self.dtype))
        return load_model(self.model, device=self.device, dtype=getattr(torch, self.dtype))

    def job(self, merging: Mapping[str, Mapping[str, Any]], **more: Any) -> Job:
        """Contents of the slots."""
        return Job(self.model, merging, attention=self.attention, device=self.device, dtype=self.dtype, **more)

    def measure(
        self, model: nn.Module, slots: Mapping[str, Any], count: int, size: tuple[int, int], command: str
    ) -> list[Row]:
        """All methods at one frame count."""
        check_memory(model, frames=count, size=size, planned=False)
        images = self.photographs(count, size)

        def forward(name: str) -> Callable[[], Any]:
            def call() -> Any:
                fill_slots(slots[name])
                return model(images, heads=self.heads)

            return call

        calls = {name: forward(name) for name in slots}
        timings = compare(calls, repeats=self.repeats, warmup=self.warmup, device=self.device)
        memory, scores = {}, {}
        dense = {DENSE}
        cost: Any = model.cost(count, size)  # type: ignore[operator]
        for name, call in calls.items():
            gc.collect()
            with peak_memory(self.device) as peak:
                call()
            memory[name] = peak[0] / GIB
            scores[name] = token_counts(model) | {"dense_tflop": cost.total / 1e12, "limit": cost.limit}
            scores[name]["spread_ms"] = timings[name].spread_ms
            if all_dense(model):
                dense.add(name)
            if name != DENSE:
                scores[name]["predicted_speedup"] = describe(model).gain or 1.0
        dense_ms = timings[DENSE].latency_ms
        rows = []
        for name in slots:
            knobs = self.methods.get(name, {})
            merged = scores[name].pop("effective_ratio", None)
            speedup = dense_ms / timings[name].latency_ms
            if (said := off(name, count, scores[name].get("predicted_speedup"), speedup)) is not None:
                say(said)
            rows.append(
                Row(
                    model=self.model,
                    merging=name,
                    quantization=describe(model).acting["quantization"] or "none",
                    attention=self.attention or "sdpa",
                    dtype=self.dtype,
                    device=self.device,
                    ratio=knobs.get("ratio"),
                    knobs=knobs_of({name: knobs}),
                    effective_ratio=merged,
                    frames=count,
                    scenes=0,
                    scores=scores[name],
                    latency_ms=timings[name].latency_ms,
                    dense_latency_ms=dense_ms,
                    speedup=speedup,
                    peak_memory_gib=memory[name],
                    dense_peak_memory_gib=memory[DENSE],
                    limit_share=None if name in dense else cost.limit_share(speedup),
                    sitting=sitting(),
                    hardware=hardware(self.device),
                    versions=versions(),
                    command=command,
                    per_scene=(),
                    skipped=(),
                    failed=(),
                )
            )
        return rows

    def photographs(self, count: int, size: tuple[int, int]) -> Tensor:  # [1, S, 3, H, W]
        """Frames of a rendered scene, in the model's dtype."""
        images = sequence(self.scene, frames=max(2, count), size=size).images[:, :count]
        return images.to(self.device, getattr(torch, self.dtype))


def off(name: str, frames: int, predicted: float | None, measured: float) -> str | None:
    """A line if the predicted and the measured speedup differ too much; else None."""
    if predicted is None or abs(predicted / measured - 1) <= TOLERANCE:
        return None
    return f"{name} at {frames} frames: {predicted:.2f}x was predicted, {measured:.2f}x measured"


def token_counts(model: nn.Module) -> dict[str, float]:
    """Tokens before and after merging in the last forward, means over the attentions with merging."""
    found = list(effects(model))
    if not found:
        return {}
    mean = {
        "tokens": sum(effect.tokens for effect in found),
        "query_tokens": sum(effect.queries for effect in found),
        "key_tokens": sum(effect.keys for effect in found),
        "effective_ratio": sum(effect.effective_ratio for effect in found),
        "effective_key_ratio": sum(effect.effective_key_ratio for effect in found),
    }
    return {name: total / len(found) for name, total in mean.items()}
