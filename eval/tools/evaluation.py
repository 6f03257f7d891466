"""From a plan to the row of a report: predict, score, time, compare layers; earlier measurements are reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from geoaccel import fingerprint
from geoaccel.console import counted, say, warn
from geoaccel.eval.bench.timing import Measurement, measure
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.report import Row, knobs_of
from geoaccel.eval.report.paths import plot_path, write_path_pictures
from geoaccel.eval.run import layers, made_by
from geoaccel.eval.run.layers import compare_layers, write_layers
from geoaccel.eval.run.made_by import MADE_BY, read_record, write_record
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import Evaluation, predict, score, totals
from geoaccel.eval.run.scoring import SceneScores
from geoaccel.eval.run.store import discard_unused, photographs
from geoaccel.runtime import in_words
from geoaccel.workers import reason_to_go_on

TIMING = "timing.json"
SITTING = "sitting"
TIMES = ("end_to_end_ms", "spread_ms", "dense_spread_ms")
SHOWN = {
    "auc_30": "mean AUC@30",
    "ate_percent": "mean ATE in percent of the path",
    "fidelity_auc_30": "mean fidelity AUC@30",
}
T = TypeVar("T")

NOTHING_LEFT_OUT = (
    "no token was merged, and the output is the dense model's: methods are bypassed if their predicted gain is too "
    "small (min_gain); use more frames, or merging.NAME.bypass=false"
)


def run_plan(plan: Plan, command: str) -> list[Row]:
    """Evaluate with a progress bar, and return the row of the report.

    Args:
        plan: What to do.
        command: The command, for the report.

    Raises:
        ValueError: If the folder belongs to another configuration, or no scene could be scored.
    """
    is_new = not plan.folder.exists()
    try:
        with Bar(plan) as bar:
            found = score(plan, predict(plan, renewed=bar.say), progress=bar.advance)
    except BaseException:
        if is_new:
            discard_unused(plan.folder)
        raise
    finally:  # even if nothing could be scored
        skipped = tuple(dict.fromkeys(map(str, plan.source.skipped)))
        for line in skipped:
            warn(f"skipped {line}")
    for name, reason in found.failed.items():
        warn(f"failed {name}: {reason}")
    if found.effective_ratio == 0 and found.scores.get("effective_key_ratio") == 0:
        warn(NOTHING_LEFT_OUT)
    if "auc_30" not in found.scores and plan.job.windows is None:
        say("images without poses: compared with the dense model, not scored")
    first = _one_forward(found)
    problems: list[str] = []
    attempt("layers", lambda: compared_layers(plan, first), problems)
    timed = attempt("timing", lambda: timing(plan, first), problems)
    own = row(plan, found, timed, command, skipped=skipped, problems=tuple(problems))
    if plan.job.windows is not None:
        write_paths(plan, found, own.method)
    return [*dense_row(plan, found, own, timed), own]


def _one_forward(found: Evaluation) -> EvalScene:
    """Input of one forward on the first scored scene: for a sequence, its first window."""
    assert found.first is not None
    details = found.scenes[0].details
    if details is None:
        return found.first
    return found.first.subset(range(min(details.about["window"], len(found.first.frames))))


def write_paths(plan: Plan, found: Evaluation, method: str) -> None:
    """Draw the path of every sequence, and the dense model's if compared."""
    store, dense = plan.store(), {scene.name: scene.details for scene in found.dense}
    figures = {}
    for scene in found.scenes:
        assert scene.details is not None
        beside = dense.get(scene.name)
        shown = {} if beside is None else {"dense": beside.paths}
        name = scene.name if scene.category is None else f"{scene.category}, {scene.name}"
        figures[store.plain_name(scene.name)] = plot_path(
            name, scene.details.truth, shown | {method: scene.details.paths}
        )
    write_path_pictures(plan.folder, figures)


class Bar:
    """Progress bar: the number of scenes done, and the mean of their scores so far."""

    def __init__(self, plan: Plan) -> None:
        self.bar: Any = counted(len(plan.source) or None, "scene", desc=plan.folder.name)
        self.values: dict[str, list[float]] = {name: [0.0, 0] for name in SHOWN}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        warn(line)

    def advance(self, scene: EvalScene, scores: SceneScores | None) -> None:
        """One more scene is done; its scores are added to running sums."""
        for name, sums in self.values.items():
            if scores is not None and name in scores.values:
                sums[0] += scores.values[name]
                sums[1] += 1
        shown = next((name for name, (_, count) in self.values.items() if count), None)
        total, count = self.values[shown] if shown else (0.0, 1)
        self.bar.set_postfix_str(f"{SHOWN[shown]} {total / count:.3f}" if shown else "no scores yet")
        self.bar.update()


def timing(plan: Plan, scene: EvalScene) -> dict[str, Any] | None:
    """The plan's model timed on a scene, with provenance; an identical earlier measurement is reused.

    Identical means: this code on this machine with these versions and threads, these images, as many repeats. If the
    plan has no timing, any number of repeats is accepted.
    """
    path = plan.folder / TIMING
    made = _made_on(plan, scene, made_by.TIMING)
    made |= {"repeats": plan.repeats, "warmup": plan.warmup} if plan.repeats else {}
    found = read_record(path, made)
    if found is None:
        path.unlink(missing_ok=True)
    if found is None and plan.repeats:
        say(f"timing on {scene.name}: {plan.repeats} forwards each, dense and accelerated alternating")
        timed = measure(plan.job, scene, repeats=plan.repeats, warmup=plan.warmup)
        found = {**timed.as_dict(), SITTING: made_by.sitting()}
        write_record(path, made, found)
    if found is None:
        return None
    when = found.pop(SITTING, "")
    return {**Measurement(**found).as_dict(), SITTING: when, MADE_BY: made}


def compared_layers(plan: Plan, scene: EvalScene) -> None:
    """Compare a scene with the dense model frame by frame and block by block, if requested and not done yet."""
    path = plan.folder / layers.LAYERS
    made = _made_on(plan, scene, made_by.LAYERS)
    if read_record(path, made) is not None:
        return
    for name in (layers.LAYERS, layers.PLOT):
        (plan.folder / name).unlink(missing_ok=True)
    if plan.fidelity and plan.job.accelerated:
        write_layers(plan.folder, compare_layers(plan.job, scene), made)
        say(f"wrote {path}")


def _made_on(plan: Plan, scene: EvalScene, modules: tuple[str, ...]) -> dict[str, Any]:
    """Everything that a measurement of the plan's model on a scene depends on."""
    stamps = None
    with suppress(OSError):  # missing images match no earlier measurement
        stamps = [list(stamp) for stamp in photographs(scene)]
    return {
        **made_by.made_by(plan.job.device, modules),
        "configuration": fingerprint.of_json(plan.store().config),
        "scene": scene.name,
        "frames": [frame.name for frame in scene.frames],
        "photographs": stamps,
    }


def row(
    plan: Plan,
    found: Evaluation,
    timed: Mapping[str, Any] | None,
    command: str,
    *,
    skipped: tuple[str, ...] = (),
    problems: tuple[str, ...] = (),
) -> Row:
    """All results of a plan, with the hardware and versions that produced them.

    Args:
        plan: What was done.
        found: Its scores.
        timed: Output of :func:`timing`.
        command: The command that was run.
        skipped, problems: ``name: reason`` of scenes that were left out, and of measurements that failed.
    """
    job = plan.job
    ratios = {knobs["ratio"] for knobs in job.merging.values() if knobs.get("ratio") is not None}
    scored = [{"scene": s.name, "category": s.category, "frames": s.frames, **s.values} for s in found.scenes]
    failed = [{"scene": name, "failed": reason} for name, reason in found.failed.items()]
    measured = {} if timed is None else timed
    return Row(
        model=job.model,
        merging="+".join([*job.merges, *([job.control] if job.control else [])]) or "none",
        quantization="+".join(job.quantized_by) or job.held,
        attention=job.attention or "sdpa",
        dtype=job.dtype,
        device=job.device,
        ratio=min(ratios) if len(ratios) == 1 else None,
        knobs=knobs_of(job.merging, job.quantization),
        effective_ratio=found.effective_ratio,
        frames=max(scene.frames for scene in found.scenes),
        scenes=len(found.scenes),
        scores={**found.scores, **{name: measured[name] for name in TIMES if name in measured}},
        latency_ms=measured.get("latency_ms"),
        dense_latency_ms=measured.get("dense_latency_ms"),
        speedup=measured.get("speedup"),
        peak_memory_gib=measured.get("peak_memory_gib"),
        dense_peak_memory_gib=measured.get("dense_peak_memory_gib"),
        limit_share=measured.get("limit_share"),
        sitting=measured.get(SITTING, ""),
        hardware=_hardware(found, timed),
        versions=_versions(found),
        command=command,
        per_scene=(*scored, *failed),
        skipped=skipped,
        failed=(*(f"{name}: {reason}" for name, reason in found.failed.items()), *problems),
    )


def dense_row(plan: Plan, found: Evaluation, own: Row, timed: Mapping[str, Any] | None) -> list[Row]:
    """The row of the dense model with its results; none if it was neither timed nor compared with.

    Args:
        plan: What was done.
        found: Scores, including those of the dense model with ``fidelity``.
        own: The row of the accelerated model.
        timed: Output of :func:`timing`.
    """
    if not plan.job.accelerated or (timed is None and not found.dense):
        return []
    scored = [{"scene": s.name, "category": s.category, "frames": s.frames, **s.values} for s in found.dense]
    scores = totals(found.dense, plan.protocol) if found.dense else {}
    times: dict[str, Any] = {"latency_ms": None, "peak_memory_gib": None}
    if timed is not None:
        times = {name: timed[f"dense_{name}"] for name in times}
        scores |= dict.fromkeys(("spread_ms", "dense_spread_ms"), timed["dense_spread_ms"])
    return [
        replace(
            own,
            merging="none",
            quantization=plan.job.held,
            ratio=None,
            knobs={},
            effective_ratio=None,
            scenes=len(found.dense),
            scores=scores,
            speedup=None if timed is None else 1.0,
            limit_share=None,
            per_scene=tuple(scored),
            failed=(),
            **times,
        )
    ]


def of_one_sitting(rows: Sequence[Row]) -> list[Row]:
    """Rows that may be in one table: times of several runs are dropped, with a warning."""
    timed = {row.sitting or f"row {i}" for i, row in enumerate(rows) if row.is_timed}
    if len(timed) < 2:
        return list(rows)
    why = f"timing: the rows were timed in {len(timed)} runs; delete their {TIMING} to time all of them in one"
    warn(f"left out {why}")
    return [
        replace(
            row,
            latency_ms=None,
            dense_latency_ms=None,
            speedup=None,
            limit_share=None,
            sitting="",
            scores={name: value for name, value in row.scores.items() if name not in TIMES},
            failed=(*row.failed, why),
        )
        for row in rows
    ]


def _hardware(found: Evaluation, timed: Mapping[str, Any] | None) -> str:
    """Hardware of the predictions, and of the timing if different."""
    predicted = " and ".join(dict.fromkeys(map(in_words, found.made_by)))
    own = predicted if timed is None else in_words(timed[MADE_BY])
    return predicted if own == predicted else f"{predicted}; timed on {own}"


def _versions(found: Evaluation) -> dict[str, str]:
    """Versions used for the predictions."""
    names = ("geoaccel", "code", "torch", "python")
    return {name: " and ".join(dict.fromkeys(str(made[name]) for made in found.made_by)) for name in names}


def attempt(what: str, measure: Callable[[], T], problems: list[str]) -> T | None:
    """Measure something besides the scores; on failure None and a line in `problems`, so that scores are kept."""
    try:
        return measure()
    except Exception as error:
        reason = reason_to_go_on(error)
        if reason is None:
            raise
        problems.append(f"{what}: {reason}")
        warn(f"failed {problems[-1]}")
        return None
