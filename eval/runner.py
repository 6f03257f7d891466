"""One evaluation: predict what is missing, score everything from disk, time the model, and keep what was found.

    run/
      config.json, predictions/         geoaccel.eval.store
      dense/                            the same of the dense model, where fidelity is asked for
      scores.json                       every scene's scores; a function of the predictions alone
      timing.json                       latency and memory, which no two runs share

Scores are made from what is on disk, so scoring again needs no model, and a run that was killed ends with the same
bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.engines import Engine, local
from geoaccel.eval.fidelity import fidelity
from geoaccel.eval.job import Job
from geoaccel.eval.prepare import Truth, truth_of
from geoaccel.eval.scoring import Protocol, SceneScores, aggregate, score_scene
from geoaccel.eval.store import Prediction, Store, write_text
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
    """

    scores: dict[str, float] = field(default_factory=dict)
    scenes: list[SceneScores] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    effective_ratio: float | None = None


def evaluate(
    job: Job,
    scenes: Scenes,
    protocol: Protocol,
    folder: str | Path,
    *,
    data: Mapping[str, Any],
    with_fidelity: bool = False,
    engine: Engine = local,
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
        progress: Called after each scene with its name, how many are done, and the scores so far.

    Raises:
        ValueError: If the folder belongs to another configuration, or not one scene could be scored.
    """
    folder = Path(folder)
    store = Store(folder, {**job.describe(), "data": dict(data)})
    store.sweep()
    reference: Store | None = None
    found = Evaluation()
    if with_fidelity:
        reference = Store(folder / "dense", {**job.dense.describe(), "data": dict(data)})
        reference.sweep()
        for scene, reason in engine(job.dense, scenes(), reference):
            if reason is not None:
                found.failed[scene.name] = f"dense model: {reason}"
    ratios = []
    for done, (scene, reason) in enumerate(engine(job, scenes(), store), start=1):
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
                if prediction.effective_ratio is not None:
                    ratios.append(prediction.effective_ratio)
        progress(scene.name, done, aggregate(found.scenes, protocol))
    if not found.scenes:
        first = next(iter(found.failed.items()), None)
        why = "the data set has none" if first is None else f"first of {len(found.failed)}: {first[0]}: {first[1]}"
        raise ValueError(f"no scene could be scored ({why})")
    found.scores = aggregate(found.scenes, protocol)
    found.effective_ratio = sum(ratios) / len(ratios) if ratios else None
    write_scores(folder / "scores.json", found)
    return found


def score_prediction(
    prediction: Prediction, scene: EvalScene, protocol: Protocol, reference: Prediction | None = None
) -> SceneScores:
    """Score a prediction that was read from disk.

    Raises:
        ValueError: If it is of other frames, or cannot be scored.
    """
    names = tuple(frame.name for frame in scene.frames)
    if prediction.frames != names:
        raise ValueError(f"the prediction on disk is of other frames ({len(prediction.frames)} of them); delete it")
    truth = Truth(scene.cam_from_world) if protocol.cameras_only else truth_of(scene, prediction.transforms)
    scores = score_scene(prediction.geometry, truth, protocol, scene=scene, transforms=prediction.transforms)
    if reference is not None:
        scores.values.update(fidelity(prediction.geometry, reference.geometry))
    return scores


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
