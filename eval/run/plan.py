"""The plan of an evaluation, as ``configs/eval.yaml`` describes it or a notebook builds it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geoaccel.attention_kernels import KERNELS
from geoaccel.errors import UserError
from geoaccel.eval.data.calibration import refuse_calibration_scenes
from geoaccel.eval.data.registry import SEQUENCES
from geoaccel.eval.data.scene import EvalScene, Skipped
from geoaccel.eval.metrics.points import load_scipy
from geoaccel.eval.run.engines import Engine, local
from geoaccel.eval.run.job import CONTROLS, Job
from geoaccel.eval.run.ray import RayEngine
from geoaccel.eval.run.room import Room
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.sequences import AutoLengths, Windows
from geoaccel.eval.run.settings import methods_of, out_folder, refuse_given, section, whole_number
from geoaccel.eval.run.source import Source
from geoaccel.eval.run.store import Store
from geoaccel.fingerprint import of_json
from geoaccel.registry import unknown
from geoaccel.runtime import MIN_REPEATS, pick_device, pick_dtype
from geoaccel.workers import ENGINES

LENGTHS = "lengths.json"


@dataclass(frozen=True)
class Plan:
    """A model, scenes, what is scored, and a folder.

    :func:`geoaccel.eval.run.runner.predict` predicts, :func:`geoaccel.eval.run.runner.score` scores what it predicted,
    and :func:`geoaccel.eval.tools.evaluation.row` makes the row of a report from that.

    Attributes:
        job: The model and its methods.
        source: Source of the scenes.
        protocol: What is scored.
        folder: Folder of predictions, scores and report.
        fidelity: Also predict with the dense model, and compare.
        engine: Engine that predicts.
        repeats, warmup: Timed forwards, and untimed ones before them; 0 repeats: no timing.
    """

    job: Job
    source: Source
    protocol: Protocol
    folder: Path
    fidelity: bool = False
    engine: Engine = local
    repeats: int = 0
    warmup: int = 1

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Plan:
        """Check settings of ``configs/eval.yaml``, as far as possible without data or a model.

        Raises:
            ValueError: For an invalid setting; one line says which, and what is allowed.
            MissingPackage: If points are to be scored without SciPy.
        """
        data, timing = section(settings, "data"), section(settings, "timing")
        protocol, resize = section(data, "protocol"), data.pop("resize")
        del data["protocol"]
        for name, given in (("fidelity", settings["fidelity"]), ("data.resize", resize)):
            if not isinstance(given, bool):  # otherwise the word `no` would count as true
                raise UserError(f"{name}={given}: give true or false")
        ray = section(settings, "ray")
        if settings["engine"] != "ray":
            refuse_given(ray, dict.fromkeys(ray), "is only for engine=ray; add that, or leave it out", "ray.")
        repeats = timing["repeats"]
        if type(repeats) is not int or (repeats != 0 and repeats < MIN_REPEATS):
            raise UserError(f"timing.repeats={repeats}: give at least {MIN_REPEATS}, or 0 for no timing")
        if settings["engine"] not in ENGINES:
            raise UserError(unknown("engine", settings["engine"], list(ENGINES)))
        job = _job(settings, pick_device(settings["device"]), resize)
        source = Source(**data, need_poses=not settings["fidelity"])
        if job.windows is not None and not source.is_sequence:
            raise UserError(_no_sequence(source))
        scored = Protocol(**protocol, points_from=settings["points"])
        if scored.points is not None:
            load_scipy()
        return cls(
            job=job,
            source=source,
            protocol=scored,
            folder=out_folder(settings, default_folder(job, source)),
            fidelity=settings["fidelity"],
            engine=local if settings["engine"] == "local" else RayEngine(**ray),
            repeats=repeats,
            warmup=whole_number(timing, "warmup", 0, "timing."),
        )

    @property
    def title(self) -> str:
        """Title of the report."""
        return f"{self.job.model} on {', '.join([self.source.dataset, *self.source.notes])}"

    @property
    def scored(self) -> str:
        """The scoring, and the scenes and frames, in words."""
        if self.job.windows is not None:
            fixed = None if (auto := self.auto()) is None else auto.read()
            return ", ".join(["trajectories", self.job.windows.words(fixed), *self.source.notes])
        fields = [f"{key} {value}" for key, value in asdict(self.protocol).items() if value is not None]
        return ", ".join([*fields, *self.source.notes])

    def scenes(self) -> Iterator[EvalScene]:
        """Scenes of the source, unless the checkpoint was calibrated on one of them; infeasible ones are skipped.

        These are known before a model is loaded: a scene without the data needed to score points, a sequence shorter
        than its windows, or a whole one that does not fit in memory at once.
        """
        room = Room(self.job) if self.job.windows is None and self.source.is_whole else None
        for scene in refuse_calibration_scenes(self.job.model, self.source()):
            checks = [self.protocol.why_not if self.job.windows is None else self.job.windows.why_not]
            checks += [] if room is None else [room.why_not]
            if reason := next((why for check in checks if (why := check(scene)) is not None), None):
                self.source.skipped.append(Skipped(scene.name, reason))
            else:
                yield scene

    def store(self) -> Store:
        """The store of the predictions.

        Raises:
            ValueError: If the folder has those of another configuration.
        """
        return Store(self.folder, {**self.job.describe(), "data": self.source.describe()}, self.auto())

    def auto(self) -> AutoLengths | None:
        """The choice of ``windows=auto``, for both stores; None if the length of windows is given."""
        if self.job.windows is None or self.job.windows.frames != "auto":
            return None
        return AutoLengths(self.folder / LENGTHS, of_json(self._dense_config()))

    def _dense_config(self) -> dict[str, Any]:
        return {**self.job.dense.describe(), "data": self.source.describe()}

    def reference(self) -> Store | None:
        """The store of the dense model's predictions; None if nothing is compared with it."""
        if not self.fidelity:
            return None
        return Store(self.folder / "dense", self._dense_config(), self.auto())


def _job(settings: Mapping[str, Any], device: str, resize: bool) -> Job:
    control = settings["control"]
    if control is not None and control not in CONTROLS:
        raise UserError(unknown("control", control, list(CONTROLS)))
    for name in ("layers", "plan"):
        if settings[name] is not None and not (name == "layers" and settings["merging"]):
            refuse_given(settings, {"ratio": None}, f"is only for merging=NAME, and {name} has its own knobs; omit it")
    job = Job(
        model=str(settings["model"]),
        merging=methods_of(settings["merging"], settings["ratio"]),
        quantization=methods_of(settings["quantization"]),
        attention=settings["attention"],
        control=control,
        layers=settings["layers"],
        plan=None if settings["plan"] is None else str(settings["plan"]),
        device=device,
        dtype=pick_dtype(settings["dtype"], device, ask_processor=False),
        resize=resize,
        windows=Windows.from_settings(settings["windows"], section(settings, "joining")),
    )
    job.methods()  # their knobs are checked when they are made
    if job.attention is not None:
        KERNELS[job.attention]
    return job


def _no_sequence(source: Source) -> str:
    if source.dataset in SEQUENCES:
        return f"data.rule={source.rule} changes the order of frames, which windows need; use data.frames=all"
    known = ", ".join(sorted(SEQUENCES))
    return f"windows need a video, and {source.dataset} has none; leave windows out, or use data of {known}"


def default_folder(job: Job, source: Source) -> Path:
    """A separate folder for every configuration that is likely to be compared with another."""
    methods = "+".join([*job.merges, *job.quantization]) or "dense"
    knobs = next((knobs.get("ratio") for knobs in job.merging.values()), None)
    parts = [source.dataset, *([source.split] if source.split not in (None, "validation") else [])]
    parts += [Path(job.model).stem, methods]
    parts += [f"ratio{knobs:g}"] if isinstance(knobs, int | float) else []
    parts += [f"{source.frames}frames"] if source.frames else []
    parts += [f"windows{job.windows.frames}"] if job.windows is not None else []
    parts += [job.dtype] if job.dtype != "float32" else []
    parts += [job.control] if job.control else []
    return Path("runs") / "eval" / re.sub(r"[^\w.+-]", "_", "-".join(parts))
