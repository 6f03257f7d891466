"""One evaluation: predict what is missing, score everything from disk, time the model, and keep what was found.

    run/
      config.json, predictions/         geoaccel.eval.run.store
      dense/                            the same of the dense model, where fidelity is asked for
      scores.json                       every scene's scores; a function of the predictions alone
      timing.json                       latency and memory, which no two runs share

Scores are made from what is on disk, so scoring again needs no model, and a run that was killed ends with the same
bytes as one that was not. A prediction of other frames, or of photographs that were replaced since, is made anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene, Skipped
from geoaccel.eval.metrics.fidelity import fidelity
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.run.engines import Engine, local
from geoaccel.eval.run.job import Job, photographs
from geoaccel.eval.run.layers import LAYERS, PLOT
from geoaccel.eval.run.prepare import Truth, truth_of
from geoaccel.eval.run.scoring import Protocol, SceneScores, aggregate, means, score_scene
from geoaccel.eval.run.store import SCORES, TIMING, Prediction, Store, write_text
from geoaccel.images.read import one_line
from geoaccel.quantization import assert_outputs_differ

Scenes = Callable[[], Iterable[EvalScene]]


@dataclass
class Evaluation:
    """What a run found.

    Attributes:
        scores: Of the data set.
        scenes: Of each scene, in the order of the data set.
        failed: Scene to the reason why it has no scores.
        effective_ratio: Mean over scenes; None where nothing was merged.
        first: The first scene that was scored: a model can run on it.
    """

    scores: dict[str, float] = field(default_factory=dict)
    scenes: list[SceneScores] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    effective_ratio: float | None = None
    first: EvalScene | None = field(default=None, repr=False, compare=False)


def evaluate(
    job: Job,
    scenes: Scenes,
    protocol: Protocol,
    folder: str | Path,
    *,
    data: Mapping[str, Any],
    with_fidelity: bool = False,
    engine: Engine = local,
    skipped: Sequence[Skipped] = (),
    progress: Callable[[str, int, dict[str, float]], None] = lambda name, done, scores: None,
) -> Evaluation:
    """Predict and score every scene.

    Args:
        job: The model and its methods.
        scenes: Gives the scenes, as often as it is called.
        protocol: What to score.
        folder: Of the run.
        data: Where the scenes come from; part of the configuration that must not change between two starts.
        with_fidelity: Also predict with the dense model, and compare.
        engine: Who predicts.
        skipped: What `scenes` leaves out while it is read, for the error where nothing is left.
        progress: Called after each scene with its name, how many are done, and the scores so far.

    Raises:
        ValueError: If the folder belongs to another configuration, or not one scene could be scored.
    """
    folder = Path(folder)
    store = Store(folder, configuration(job, data))
    store.sweep()
    if store.empty:
        _remove_measurements(folder)
    reference: Store | None = None
    found = Evaluation()
    if with_fidelity:
        reference = Store(folder / "dense", configuration(job.dense, data))
        reference.sweep()
        for scene, reason in engine(job.dense, _current(scenes(), reference, folder), reference):
            if reason is not None:
                found.failed[scene.name] = f"dense model: {reason}"
    ratios = []
    for done, (scene, reason) in enumerate(engine(job, _current(scenes(), store, folder), store), start=1):
        if reason is not None:
            found.failed.setdefault(scene.name, reason)
        if scene.name not in found.failed:
            try:
                prediction = store.read(scene.name)
                against = None if reference is None else reference.read(scene.name)
                if against is not None and job.quantization:
                    assert_outputs_differ(vars(prediction.geometry), vars(against.geometry))
                found.scenes.append(score_prediction(prediction, scene, protocol, against))
            except (ValueError, OSError) as error:
                found.failed[scene.name] = one_line(error)
            else:
                found.first = found.first or scene
                if prediction.effective_ratio is not None:
                    ratios.append(prediction.effective_ratio)
        progress(scene.name, done, totals(found.scenes, protocol))
    if not found.scenes:
        raise UserError(f"no scene could be scored ({_why_none(found.failed, skipped)})")
    found.scores = totals(found.scenes, protocol)
    found.effective_ratio = sum(ratios) / len(ratios) if ratios else None
    store.require_own()
    write_scores(folder / SCORES, found)
    return found


def configuration(job: Job, data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what is predicted."""
    return {**job.describe(), "data": dict(data)}


def _current(scenes: Iterable[EvalScene], store: Store, run: Path) -> Iterator[EvalScene]:
    """Pass scenes on to an engine; a prediction of other frames or photographs makes room for a new one."""
    for scene in scenes:
        store.require_own()
        if scene.name in store and _outdated(scene, store):
            store.remove(scene.name)
            _remove_measurements(run)
        yield scene


def _outdated(scene: EvalScene, store: Store) -> bool:
    try:
        return store.made_from(scene.name) != (tuple(frame.name for frame in scene.frames), photographs(scene))
    except (ValueError, OSError):
        return False  # damaged, which is said when it is read; or without photographs to make it anew from


def _remove_measurements(run: Path) -> None:
    """What was measured on photographs that are others now, or of predictions that are no more."""
    for name in (TIMING, LAYERS, PLOT):
        (run / name).unlink(missing_ok=True)


def _why_none(failed: Mapping[str, str], skipped: Sequence[Skipped]) -> str:
    reasons = [f"first of {len(failed)}: {name}: {reason}" for name, reason in list(failed.items())[:1]]
    left_out = list(dict.fromkeys(map(str, skipped)))
    reasons += [f"first of {len(left_out)} skipped: {line}" for line in left_out[:1]]
    return "; ".join(reasons) or "the data set has none"


def totals(scenes: Sequence[SceneScores], protocol: Protocol) -> dict[str, float]:
    """Scores of a data set; of photographs without poses, the means of what needs no truth."""
    if any(len(scene.pairs.rotation_deg) for scene in scenes):
        return aggregate(scenes, protocol)
    return means(scenes)


def score_prediction(
    prediction: Prediction, scene: EvalScene, protocol: Protocol, reference: Prediction | None = None
) -> SceneScores:
    """Score a prediction that was read from disk.

    Raises:
        ValueError: If one of them is of other frames, or cannot be scored.
    """
    names = tuple(frame.name for frame in scene.frames)
    for made in (prediction, prediction if reference is None else reference):
        if made.frames != names:
            raise UserError(f"the prediction on disk is of other frames ({len(made.frames)} of them); delete it")
    if not scene.cam_from_world.isfinite().all():
        return _without_truth(prediction, scene, reference)
    truth = Truth(scene.cam_from_world) if protocol.cameras_only else truth_of(scene, prediction.transforms)
    scores = score_scene(prediction.geometry, truth, protocol, scene=scene, transforms=prediction.transforms)
    if reference is not None:
        scores.values.update(fidelity(prediction.geometry, reference.geometry))
    return scores


def _without_truth(prediction: Prediction, scene: EvalScene, reference: Prediction | None) -> SceneScores:
    """Scores of photographs without poses: how far the prediction is from the dense one."""
    if reference is None:
        raise UserError("photographs without poses have no truth; fidelity=true compares with the dense model")
    none = torch.empty(0)
    values = fidelity(prediction.geometry, reference.geometry)
    return SceneScores(scene.name, scene.category, len(scene.frames), PairErrors(none, none), values)


def write_scores(path: Path, found: Evaluation) -> None:
    """Write scores so that the same predictions give the same bytes."""
    document = {
        "scores": _finite(found.scores),
        "effective_ratio": found.effective_ratio,
        "scenes": [
            {"scene": s.name, "category": s.category, "frames": s.frames, **_finite(s.values)} for s in found.scenes
        ],
        "failed": dict(sorted(found.failed.items())),
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
