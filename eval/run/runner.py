"""One evaluation: predict what is missing, then score what is on disk.

    run/
      config.json, predictions/         geoaccel.eval.run.store
      dense/                            the same of the dense model, with fidelity=true
      windows/                          windows of unfinished sequences
      lengths.json                      window length chosen by windows=auto, for all sequences and the dense model
      scores.json                       every scene's scores; a function of the predictions only
      timing.json, layers.json          geoaccel.eval.tools.evaluation

    for scene, reason in predict(plan): ...       # a model and its methods, scene by scene
    found = score(plan)                           # from disk, without a model
    found = score(plan, predict(plan))            # each scene as soon as it is predicted

Scores are computed from the files, so scoring again needs no model, and an interrupted and resumed run ends with the
same bytes as an uninterrupted one. A prediction for other frames, for images that were replaced since, or from other
code or another machine is recomputed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geoaccel.atomic import write_text
from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene, Skipped
from geoaccel.eval.metrics.fidelity import fidelity
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.run.engines import Outcome
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.prepare import Truth, truth_of
from geoaccel.eval.run.scoring import Protocol, SceneScores, aggregate, means, score_scene
from geoaccel.eval.run.sequence_scores import score_sequence, sequence_totals
from geoaccel.eval.run.store import SCORES, Prediction, Store
from geoaccel.eval.run.trajectory import Trajectory
from geoaccel.images.read import one_line
from geoaccel.quantization import assert_outputs_differ

Progress = Callable[[EvalScene, SceneScores | None], None]


@dataclass
class Evaluation:
    """Results of a run.

    Attributes:
        scores: Scores of the data set.
        scenes: Scores of each scene, in the order of the data set.
        dense: The same of the dense model, if the plan compares with it and the scene has known cameras.
        failed: By scene, the reason why it has no scores.
        effective_ratio: Mean over scenes; None if nothing was merged.
        first: The first scored scene: a model can run on it.
        made_by: The different code, machines and versions that made the predictions; one except on a cluster.
    """

    scores: dict[str, float] = field(default_factory=dict)
    scenes: list[SceneScores] = field(default_factory=list)
    dense: list[SceneScores] = field(default_factory=list, repr=False)
    failed: dict[str, str] = field(default_factory=dict)
    effective_ratio: float | None = None
    first: EvalScene | None = field(default=None, repr=False, compare=False)
    made_by: list[Mapping[str, Any]] = field(default_factory=list, repr=False, compare=False)


def predict(plan: Plan, *, renewed: Callable[[str], None] = lambda line: None) -> Iterator[Outcome]:
    """Predict what is missing, first with the dense model if the plan compares with it.

    Args:
        plan: What to predict.
        renewed: Called with a line of text for each scene whose prediction had to be recomputed.

    Yields:
        Every scene when its predictions are on disk, with None; or with the reason why there is none.

    Raises:
        ValueError: If the folder belongs to another configuration.
    """
    store, reference = plan.store(), plan.reference()
    failed = {}
    if reference is not None:
        for scene, reason in _predicted(plan, plan.job.dense, reference, renewed):
            if reason is not None:
                failed[scene.name] = f"dense model: {reason}"
    for scene, reason in _predicted(plan, plan.job, store, renewed):
        yield scene, failed.get(scene.name, reason)


def _predicted(plan: Plan, job: Any, store: Store, renewed: Callable[[str], None]) -> Iterator[Outcome]:
    store.sweep()
    for scene, reason in plan.engine(job, plan.scenes(), store):
        if scene.name in store.renewed:
            renewed(f"{scene.name} was predicted again: {store.renewed.pop(scene.name)}")
        yield scene, reason


def score(
    plan: Plan, outcomes: Iterable[Outcome] | None = None, *, progress: Progress = lambda scene, scores: None
) -> Evaluation:
    """Score predictions from disk, and write ``scores.json``.

    Args:
        plan: What was predicted.
        outcomes: Output of :func:`predict`; None scores the existing predictions.
        progress: Called after each scene, with its scores or None.

    Raises:
        ValueError: If the folder belongs to another configuration, or no scene could be scored.
    """
    store, reference = plan.store(), plan.reference()
    found = Evaluation()
    ratios: list[float] = []
    keys: list[float] = []
    for scene, reason in _on_disk(plan, store) if outcomes is None else outcomes:
        scores = None
        try:
            if reason is not None:
                raise UserError(reason)
            prediction = store.read(scene.name)
            against = None if reference is None else reference.read(scene.name)
            if against is not None and plan.job.quantizes:
                assert_outputs_differ(vars(prediction.geometry), vars(against.geometry))
            scores = score_prediction(prediction, scene, plan.protocol, against)
        except (UserError, OSError) as error:
            found.failed[scene.name] = one_line(error)
        else:
            found.scenes.append(scores)
            if against is not None and plan.job.accelerated and scene.cam_from_world.isfinite().all():
                found.dense.append(score_prediction(against, scene, plan.protocol))
            found.first = found.first or scene
            found.made_by += [prediction.made_by] if prediction.made_by not in found.made_by else []
            ratios += [prediction.effective_ratio] if prediction.effective_ratio is not None else []
            keys += [prediction.effective_key_ratio] if prediction.effective_key_ratio is not None else []
        progress(scene, scores)
    if not found.scenes:
        raise UserError(f"no scene could be scored ({_why_none(found.failed, plan.source.skipped)})")
    found.scores = totals(found.scenes, plan.protocol)
    if keys:
        found.scores["effective_key_ratio"] = sum(keys) / len(keys)
    found.effective_ratio = sum(ratios) / len(ratios) if ratios else None
    store.require_own()
    write_scores(plan.folder / SCORES, found)
    return found


def _on_disk(plan: Plan, store: Store) -> Iterator[Outcome]:
    for scene in plan.scenes():
        yield scene, None if scene.name in store else "not predicted yet"


def _why_none(failed: Mapping[str, str], skipped: Sequence[Skipped]) -> str:
    reasons = [f"first of {len(failed)}: {name}: {reason}" for name, reason in list(failed.items())[:1]]
    left_out = list(dict.fromkeys(map(str, skipped)))
    reasons += [f"first of {len(left_out)} skipped: {line}" for line in left_out[:1]]
    return "; ".join(reasons) or "the data set has none"


def totals(scenes: Sequence[SceneScores], protocol: Protocol) -> dict[str, float]:
    """Scores of a data set; for images without poses, the means of the scores that need no ground truth."""
    if any(scene.details is not None for scene in scenes):
        return sequence_totals(scenes)
    if any(len(scene.pairs.rotation_deg) for scene in scenes):
        return aggregate(scenes, protocol)
    return means(scenes)


def score_prediction(
    prediction: Prediction, scene: EvalScene, protocol: Protocol, reference: Prediction | None = None
) -> SceneScores:
    """Score a prediction that was read from disk.

    Raises:
        ValueError: If one of them is for other frames, or cannot be scored.
    """
    names = tuple(frame.name for frame in scene.frames)
    for made in (prediction, prediction if reference is None else reference):
        if made.frames != names:
            raise UserError(f"the prediction on disk is for other frames ({len(made.frames)} of them); delete it")
    if not scene.cam_from_world.isfinite().all():
        return _without_truth(prediction, scene, reference)
    found, dense = prediction.geometry, None if reference is None else reference.geometry
    if isinstance(found, Trajectory):
        assert not isinstance(dense, Geometry)
        return score_sequence(found, scene, dense)
    truth = Truth(scene.cam_from_world) if protocol.cameras_only else truth_of(scene, prediction.transforms)
    scores = score_scene(found, truth, protocol, scene=scene, transforms=prediction.transforms)
    if dense is not None:
        assert isinstance(dense, Geometry)
        scores.values.update(fidelity(found, dense))
    return scores


def _without_truth(prediction: Prediction, scene: EvalScene, reference: Prediction | None) -> SceneScores:
    """Scores of images without poses: distance of the prediction from the dense one."""
    if reference is None:
        raise UserError("images without poses have no ground truth; compare with the dense model by fidelity=true")
    none = torch.empty(0)
    assert isinstance(prediction.geometry, Geometry)
    assert isinstance(reference.geometry, Geometry)
    values = fidelity(prediction.geometry, reference.geometry)
    return SceneScores(scene.name, scene.category, len(scene.frames), PairErrors(none, none), values)


def write_scores(path: Path, found: Evaluation) -> None:
    """Write scores so that the same predictions give the same bytes."""
    document = {
        "scores": _finite(found.scores),
        "effective_ratio": found.effective_ratio,
        "scenes": [
            {"scene": s.name, "category": s.category, "frames": s.frames, **_finite(s.values)}
            | ({} if s.details is None else {"sequence": s.details.about})
            for s in found.scenes
        ],
        "failed": dict(sorted(found.failed.items())),
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
