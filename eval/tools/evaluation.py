"""One evaluation as ``configs/eval.yaml`` describes it: checked, run, and brought into a row of the report."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from geoaccel.attention import KERNELS
from geoaccel.errors import UserError
from geoaccel.eval.bench.speed import MIN_REPEATS
from geoaccel.eval.bench.timing import Measurement, measure
from geoaccel.eval.data.calibration import refuse_calibration_scenes
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics.points import load_scipy
from geoaccel.eval.report import Row
from geoaccel.eval.run.engines import Engine, local, reason_to_go_on
from geoaccel.eval.run.job import CONTROLS, Job
from geoaccel.eval.run.layers import LAYERS, compare_layers, write_layers
from geoaccel.eval.run.runner import Evaluation, configuration, evaluate
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.settings import methods_of, out_folder, section, whole_number
from geoaccel.eval.run.source import Source
from geoaccel.eval.run.store import TIMING, Store, write_text
from geoaccel.registry import unknown
from geoaccel.runtime import hardware, pick_device, pick_dtype, versions

ENGINES = ("local", "ray")
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A configuration, checked: everything that can be wrong without data or a model is found here."""

    job: Job
    source: Source
    protocol: Protocol
    folder: Path
    fidelity: bool
    engine: str
    ray: Mapping[str, Any]
    repeats: int
    warmup: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Plan:
        """Check settings of ``configs/eval.yaml``.

        Raises:
            ValueError: For a setting that is not allowed; one line says which, and what is.
            MissingPackage: If points are to be scored without SciPy.
        """
        device = pick_device(settings["device"])
        data = section(settings, "data")
        protocol = section(data, "protocol")
        del data["protocol"]
        resize = data.pop("resize")
        control = settings["control"]
        if control is not None and control not in CONTROLS:
            raise UserError(unknown("control", control, list(CONTROLS)))
        if settings["engine"] not in ENGINES:
            raise UserError(unknown("engine", settings["engine"], list(ENGINES)))
        for name, given in (("fidelity", settings["fidelity"]), ("data.resize", resize)):
            if not isinstance(given, bool):  # the word `no` would count as true
                raise UserError(f"{name}={given}: give true or false")
        timing = section(settings, "timing")
        repeats = timing["repeats"]
        whole_number(timing, "warmup", 0, "timing.")
        if type(repeats) is not int or (repeats != 0 and repeats < MIN_REPEATS):
            raise UserError(f"timing.repeats={repeats}: give at least {MIN_REPEATS}, or 0 for no timing")
        job = Job(
            model=str(settings["model"]),
            merging=methods_of(settings["merging"], settings["ratio"]),
            quantization=methods_of(settings["quantization"]),
            attention=settings["attention"],
            control=control,
            device=device,
            dtype=pick_dtype(settings["dtype"], device),
            resize=resize,
        )
        job.methods()  # their knobs are checked when they are made
        if job.attention is not None:
            KERNELS[job.attention]
        source = Source(**data, need_poses=not settings["fidelity"])
        scored = Protocol(**protocol, points_from=settings["points"])
        if scored.points is not None:
            load_scipy()
        return cls(
            job=job,
            source=source,
            protocol=scored,
            folder=out_folder(settings, default_folder(job, source)),
            fidelity=settings["fidelity"],
            engine=settings["engine"],
            ray=settings["ray"],
            repeats=repeats,
            warmup=settings["timing"]["warmup"],
        )

    @property
    def title(self) -> str:
        """Of the report."""
        return f"{self.job.model} on {self.source.dataset}"

    @property
    def scored(self) -> str:
        """What was scored, in words."""
        return ", ".join(f"{key} {value}" for key, value in asdict(self.protocol).items() if value is not None)

    def store(self) -> Store:
        """Where the predictions are, or will be.

        Raises:
            ValueError: If the folder holds those of another configuration.
        """
        return Store(self.folder, configuration(self.job, self.source.describe()))

    def run(self, command: str) -> list[Row]:
        """Evaluate, and return the row of the report."""
        try:
            found = self.evaluate()
        finally:  # where nothing was left to score, too
            skipped = tuple(dict.fromkeys(map(str, self.source.skipped)))
            for line in skipped:
                print(f"skipped {line}", file=sys.stderr)
        for name, reason in found.failed.items():
            print(f"failed {name}: {reason}", file=sys.stderr)
        if "auc_30" not in found.scores:
            print("photographs without poses: compared with the dense model, not scored", file=sys.stderr)
        first = found.first
        assert first is not None
        problems: list[str] = []
        if self.fidelity and self.job.accelerated:
            attempt("layers", lambda: self.layers(first), problems)
        timing = attempt("timing", lambda: self.timing(first), problems)
        return [self.row(found, timing, skipped, tuple(problems), command)]

    def evaluate(self) -> Evaluation:
        """Predict and score, with a bar of progress."""
        with tqdm(
            total=len(self.source) or None, unit="scene", desc=self.folder.name, dynamic_ncols=True, file=sys.stderr
        ) as bar:

            def progress(name: str, done: int, scores: dict[str, float]) -> None:
                shown = next((key for key in ("auc_30", "fidelity_auc_30") if key in scores), None)
                said = {"auc_30": "AUC@30", "fidelity_auc_30": "fidelity AUC@30"}
                bar.set_postfix_str(f"{said[shown]} {scores[shown]:.3f}" if shown else "no scores yet")
                bar.update()

            return evaluate(
                self.job,
                self.scenes,
                self.protocol,
                self.folder,
                data=self.source.describe(),
                with_fidelity=self.fidelity,
                engine=self.make_engine(),
                skipped=self.source.skipped,
                progress=progress,
            )

    def scenes(self) -> Iterator[EvalScene]:
        """Those of the source, unless the checkpoint was calibrated on one of them."""
        return refuse_calibration_scenes(self.job.model, self.source())

    def make_engine(self) -> Engine:
        """Ray is imported only where it is used."""
        if self.engine == "local":
            return local
        from geoaccel.eval.run.ray import RayEngine

        return RayEngine(**self.ray)

    def timing(self, scene: EvalScene) -> Measurement | None:
        """Measured on a scene, or read back where this folder has been timed already."""
        path = self.folder / TIMING
        if path.exists():
            return Measurement(**json.loads(path.read_text()))
        if not self.repeats:
            return None
        print(f"timing on {scene.name}: {self.repeats} forwards, dense and accelerated in turns", file=sys.stderr)
        measured = measure(self.job, scene, repeats=self.repeats, warmup=self.warmup)
        write_text(path, json.dumps(measured.as_dict(), indent=1) + "\n")
        return measured

    def layers(self, scene: EvalScene) -> None:
        """Compare a scene with the dense model frame by frame and block by block, if that is not there yet."""
        if not (self.folder / LAYERS).exists():
            write_layers(self.folder, compare_layers(self.job, scene))
            print(f"wrote {self.folder / LAYERS}", file=sys.stderr)

    def row(
        self,
        found: Evaluation,
        timing: Measurement | None,
        skipped: tuple[str, ...],
        problems: tuple[str, ...],
        command: str,
    ) -> Row:
        """Everything that is known about this configuration."""
        job = self.job
        ratios = [knobs["ratio"] for knobs in job.merging.values() if knobs.get("ratio") is not None]
        scored = [{"scene": s.name, "category": s.category, "frames": s.frames, **s.values} for s in found.scenes]
        failed = [{"scene": name, "failed": reason} for name, reason in found.failed.items()]
        measured = {} if timing is None else timing.as_dict()
        return Row(
            model=job.model,
            merging="+".join([*job.merging, *([job.control] if job.control else [])]) or "none",
            quantization="+".join(job.quantization) or "none",
            attention=job.attention or "sdpa",
            dtype=job.dtype,
            device=job.device,
            ratio=ratios[0] if ratios else None,
            effective_ratio=found.effective_ratio,
            frames=max(scene.frames for scene in found.scenes),
            scenes=len(found.scenes),
            scores={**found.scores, **({"end_to_end_ms": measured["end_to_end_ms"]} if measured else {})},
            latency_ms=measured.get("latency_ms"),
            dense_latency_ms=measured.get("dense_latency_ms"),
            speedup=measured.get("speedup"),
            peak_memory_gib=measured.get("peak_memory_gib"),
            dense_peak_memory_gib=measured.get("dense_peak_memory_gib"),
            limit_share=measured.get("limit_share"),
            hardware=hardware(job.device),
            versions=versions(),
            command=command,
            per_scene=(*scored, *failed),
            skipped=skipped,
            failed=(*(f"{name}: {reason}" for name, reason in found.failed.items()), *problems),
        )


def attempt(what: str, measure: Callable[[], T], problems: list[str]) -> T | None:
    """What is measured beside the scores; None and a line in `problems` where it fails: the scores must not be lost."""
    try:
        return measure()
    except Exception as error:
        reason = reason_to_go_on(error)
        if reason is None:
            raise
        problems.append(f"{what}: {reason}")
        print(f"failed {problems[-1]}", file=sys.stderr)
        return None


def default_folder(job: Job, source: Source) -> Path:
    """A folder of its own for every configuration that is likely to be run beside another."""
    methods = "+".join([*job.merging, *job.quantization]) or "dense"
    knobs = next((knobs.get("ratio") for knobs in job.merging.values()), None)
    parts = [source.dataset, Path(job.model).stem, methods]
    parts += [f"ratio{knobs:g}"] if isinstance(knobs, int | float) else []
    parts += [f"{source.frames}frames"] if source.frames else []
    parts += [job.dtype] if job.dtype != "float32" else []
    parts += [job.control] if job.control else []
    return Path("runs") / "eval" / re.sub(r"[^\w.+-]", "_", "-".join(parts))
