"""Predict, score from disk, continue: the loops of an evaluation on a tiny random network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluations import run, source
from plans import evaluate
from safetensors.torch import save_file
from tiny_checkpoint import write_checkpoint

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalFrame, EvalScene, Skipped
from geoaccel.eval.run import runner
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.store import Store
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.confidence import shipped_predictors
from geoaccel.merging.layers import Layers
from geoaccel.merging.method import MERGING
from geoaccel.models import BACKBONES
from geoaccel.models.files import fingerprint
from geoaccel.tuned import TunedPlan

pytest.importorskip("scipy")


def test_scores_are_those_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    found = run(checkpoint, tmp_path / "run")
    assert [scene.name for scene in found.scenes] == ["seed000000000", "seed000000001", "seed000000002"]
    assert {"auc_3", "auc_5", "auc_15", "auc_30", "depth_abs_rel", "chamfer", "ate_rmse"} <= found.scores.keys()
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert written["scores"]["depth_abs_rel"] == found.scores["depth_abs_rel"]
    means = [scene["depth_abs_rel"] for scene in written["scenes"]]
    assert found.scores["depth_abs_rel"] == pytest.approx(sum(means) / 3)
    assert not found.failed


def test_cameras_alone_are_scored_without_any_map(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(checkpoint, tmp_path / "run").scenes[0].values
    with_points = run(checkpoint, tmp_path / "run", protocol=Protocol(depth=None)).scenes[0].values
    with_depth = run(checkpoint, tmp_path / "run", protocol=Protocol(points=None)).scenes[0].values
    assert with_points.keys() == whole.keys() - {"depth_abs_rel", "depth_delta_1_25", "conf_spearman"}
    assert with_depth.keys() == whole.keys() - {"chamfer"}

    def no_map(self: EvalFrame) -> None:
        raise AssertionError("a depth map was read")

    monkeypatch.setattr(EvalFrame, "depth", no_map)
    found = run(checkpoint, tmp_path / "run", protocol=Protocol(points=None, depth=None))
    assert not found.failed
    left_out = {"chamfer", "depth_abs_rel", "depth_delta_1_25", "conf_spearman"}
    assert found.scenes[0].values == {name: value for name, value in whole.items() if name not in left_out}


def test_scoring_again_needs_no_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(checkpoint, tmp_path / "run")
    before = (tmp_path / "run" / "scores.json").read_bytes()
    (tmp_path / "run" / "scores.json").unlink()

    def no_model(self: Predictor, job: Job) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Predictor, "__init__", no_model)
    run(checkpoint, tmp_path / "run")
    assert (tmp_path / "run" / "scores.json").read_bytes() == before
    store = Store.open(tmp_path / "run")
    for number, ratio in enumerate((0.1, None, 0.5)):
        name = f"seed{number:09d}"
        keys = None if ratio is None else 2 * ratio
        store.write(name, replace(store.read(name), effective_ratio=ratio, effective_key_ratio=keys))
    # The mean over the scenes in which something was merged.
    found = run(checkpoint, tmp_path / "run")
    assert found.effective_ratio == pytest.approx(0.3)
    assert found.scores["effective_key_ratio"] == pytest.approx(0.6)


def test_more_scenes_continue_where_fewer_ended(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", source(1))
    first = next((tmp_path / "run" / "predictions").iterdir())
    stamp = first.stat().st_mtime_ns
    found = run(checkpoint, tmp_path / "run", source(3))
    assert len(found.scenes) == 3
    assert first.stat().st_mtime_ns == stamp


def test_other_weights_under_the_same_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    run(copy, tmp_path / "run")
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="weights was"):
        run(copy, tmp_path / "run")
    assert fingerprint(str(copy)) != fingerprint(str(checkpoint))


def test_the_fingerprint_sees_every_byte_of_the_weights_and_no_order_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {name: torch.zeros(1 << 19) for name in "abc"}  # 6 MB
    metadata = {name: name for name in "abcdefgh"}
    found = set()
    for order in (metadata, dict(reversed(metadata.items()))):
        save_file(tensors, path, order)
        found.add(fingerprint(str(path)))
    assert len(found) == 1
    for index in (1, 1 << 18, -1):
        tensors["b"][index] = 1.0
        save_file(tensors, path, metadata)
        found.add(fingerprint(str(path)))
    save_file(tensors, path, {**metadata, "a": "b"})
    found.add(fingerprint(str(path)))
    assert len(found) == 5
    for broken in (b"", b"text", b"\xff" * 100):
        path.write_bytes(broken)
        found.add(fingerprint(str(path)))
    assert len(found) == 8


def test_another_kernel_or_other_frames_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.frames was 3, is now 2"):
        run(checkpoint, tmp_path / "run", replace(source(), frames=2))
    job = Job(str(checkpoint), resize=False, attention="matmul")
    with pytest.raises(ValueError, match="attention was None, is now 'matmul'"):
        evaluate(job, source(), Protocol(), tmp_path / "run", data=source().describe())


def test_a_file_among_the_knobs_is_known_by_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    predictor = tmp_path / "p.safetensors"
    save_file({"weight": torch.zeros(3)}, predictor)
    knobs = {"predictor": str(predictor), "ratio": 0.5}
    job = Job(str(checkpoint), merging={"come": knobs})
    before = job.describe()
    assert before["files"].keys() == {"come.predictor"}
    assert job.describe() == before
    save_file({"weight": torch.ones(3)}, predictor)
    os.utime(predictor, (1, 1))  # clocks of file systems tick slowly
    assert {key for key, value in job.describe().items() if value != before[key]} == {"files"}
    shipped = Job(str(checkpoint), merging={"come": {**knobs, "predictor": "auto"}}).describe()["files"]
    assert shipped == {f"come.{path.name}": fingerprint(str(path)) for path in shipped_predictors()}
    # Without files nothing is added.
    assert "files" not in Job(str(checkpoint), merging={"come": {"choose": "random"}}).describe()


def test_what_other_packages_bring_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(write_checkpoint("vggt", tmp_path)))
    assert "packages" not in job.describe()

    class Network:
        """Of the test's own module."""

    theirs = replace(BACKBONES["vggt"], network=Network)
    monkeypatch.setattr(BACKBONES, "_entries", {**BACKBONES._entries, "vggt": theirs})
    assert job.describe()["packages"].keys() == {__name__}


def test_methods_of_single_layers_and_of_plans_are_known_by_files_and_sources(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, other, path = tmp_path / "table.txt", tmp_path / "other.txt", tmp_path / "plan.yaml"

    @dataclass(frozen=True)
    class Theirs(Asymmetric):
        """Of the test's own module."""

        name = "theirs"
        table: str | None = None

        def files(self) -> list[Path]:
            return [other]

    monkeypatch.setattr(MERGING, "_entries", {**MERGING._entries, "theirs": Theirs})
    layers = {0: "theirs", 1: {"theirs": {"table": str(table)}}}
    for file in (table, other):
        file.write_text("old")
    TunedPlan({"linears": "0", "rest": "0"}, Layers.read(layers)).write(path, 2)
    files = {"layers.0.theirs.other.txt", "layers.1.theirs.other.txt", "layers.1.theirs.table"}
    for job, more in ((Job(str(checkpoint), layers=layers), set()), (Job(str(checkpoint), plan=str(path)), {"plan"})):
        before = job.describe()
        assert before["packages"].keys() == {__name__}
        assert before["files"].keys() == files | more
        for file in (table, other):
            file.write_text("other" + before["files"]["layers.1.theirs.table"])
            now = job.describe()
            assert {key for key, value in now.items() if value != before[key]} == {"files"}
            before = now


def test_one_broken_scene_is_reported_and_the_others_are_scored(checkpoint: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[EvalScene]:
        for index, scene in enumerate(source()()):
            if index == 1:
                bad = replace(scene.frames[0], read_image=lambda: torch.zeros(3, 27, 28))
                scene = replace(scene, frames=(bad, *scene.frames[1:]))
            if index == 2:
                blind = [replace(frame, read_depth=lambda: torch.zeros(28, 28)) for frame in scene.frames]
                scene = replace(scene, frames=tuple(blind))
            yield scene

    found = run(checkpoint, tmp_path / "run", read=broken)
    assert [scene.name for scene in found.scenes] == ["seed000000000"]
    assert set(found.failed) == {"seed000000001", "seed000000002"}
    assert "no depth map has a known pixel" in found.failed["seed000000002"]


def test_where_the_dense_model_fails_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = source()()
    outcomes = {"dense": [(first, "too dark"), (second, None)], "fast": [(first, None), (second, "too long")]}
    job = SimpleNamespace(dense="dense", name="fast")
    plan: Any = SimpleNamespace(store=lambda: None, reference=lambda: "there", job=job)

    def predicted(plan: Any, job: Any, *_: Any) -> list[Any]:
        return outcomes[getattr(job, "name", job)]

    monkeypatch.setattr(runner, "_predicted", predicted)
    reasons = [reason for _, reason in runner.predict(plan)]
    assert reasons == ["dense model: too dark", "too long"]


def test_nothing_to_score_is_an_error_with_the_first_reason(checkpoint: Path, tmp_path: Path) -> None:
    def all_broken() -> Iterator[EvalScene]:
        for scene in source(2)():
            yield replace(scene, frames=(*scene.frames[:2], replace(scene.frames[2], read_image=_unreadable)))

    with pytest.raises(ValueError, match=r"no scene could be scored \(first of 2: seed000000000: cut short"):
        run(checkpoint, tmp_path / "run", read=all_broken)


def test_the_first_scene_that_was_scored_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[EvalScene]:
        for index, scene in enumerate(source(3)()):
            bad = replace(scene.frames[0], read_image=_unreadable)
            yield scene if index else replace(scene, frames=(bad, *scene.frames[1:]))

    found = run(checkpoint, tmp_path / "run", read=broken)
    assert found.first is not None
    assert found.first.name == "seed000000001"


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_to_score_says_what_was_skipped(broken: bool, checkpoint: Path, tmp_path: Path) -> None:
    skipped = [Skipped("one", "3 frames, 8 are needed"), Skipped("two", "cut short"), Skipped("two", "cut short")]

    def nothing() -> Iterator[EvalScene]:
        for scene in source(1)() if broken else ():
            yield replace(scene, frames=(replace(scene.frames[0], read_image=_unreadable), *scene.frames[1:]))

    why = "first of 1: seed000000000: cut short; " if broken else ""
    with pytest.raises(ValueError, match=rf"scored \({why}first of 2 skipped: one: 3 frames, 8 are needed\)"):
        run(checkpoint, tmp_path / "run", read=nothing, skipped=skipped)


def _unreadable() -> torch.Tensor:
    raise UserError("cut short")


def test_a_model_that_outputs_nan_fails_the_scene(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_job = Job.build

    def poisoned(self: Job) -> torch.nn.Module:
        model = build_job(self)
        next(p for n, p in model.named_parameters() if "camera" in n and n.endswith("bias")).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(Job, "build", poisoned)
    with pytest.raises(ValueError, match=r"NaN|non-finite"):
        run(checkpoint, tmp_path / "run")
    assert not list((tmp_path / "run" / "predictions").iterdir())


def test_a_dense_model_is_exactly_faithful_to_itself(checkpoint: Path, tmp_path: Path) -> None:
    found = run(checkpoint, tmp_path / "run", with_fidelity=True)
    assert found.scores["fidelity_auc_30"] == 1
    assert found.scores["fidelity_rotation_deg"] == 0
    assert found.scores["fidelity_depth_abs_rel"] == 0


def test_a_control_is_not_faithful(checkpoint: Path, tmp_path: Path) -> None:
    job = Job(str(checkpoint), resize=False, control="frame-only")
    found = evaluate(job, source(), Protocol(), tmp_path / "run", data={}, with_fidelity=True)
    assert found.scores["fidelity_depth_abs_rel"] > 0
