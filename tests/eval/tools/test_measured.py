"""Measurements carry what made them: none is shown under another machine, other code, other images or repeats."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plans import evaluate, plan_of
from safetensors import safe_open
from tiny_checkpoint import write_checkpoint

from geoaccel import fingerprint
from geoaccel.errors import UserError
from geoaccel.eval.run import made_by, runner
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.layers import LAYERS
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import predict, score
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.source import Source
from geoaccel.eval.tools import evaluation
from geoaccel.eval.tools.evaluation import TIMES, TIMING, row, run_plan, timing
from geoaccel.runtime import in_words

pytest.importorskip("scipy")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path) -> Plan:
    source = Source("synthetic", frames=2, scenes=1, options={"size": [28, 28]})
    job = Job(str(checkpoint), control="frame-only", resize=False)
    return Plan(job, source, Protocol(points=None), tmp_path / "run", fidelity=True, repeats=5)


def stamps(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")
    }


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[in_words.__module__], "processor", lambda: "another CPU")


def other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method's source is another; what is hashed is its text."""
    given = fingerprint._every_source()
    text = given["merging.httm"].read_text()

    def sources() -> dict[str, Any]:
        return {**given, "merging.httm": Edited(text + "x = 1")}

    monkeypatch.setattr(fingerprint, "_every_source", sources)
    monkeypatch.setattr(fingerprint, "of_sources", fingerprint.of_sources.__wrapped__)


class Edited:
    def __init__(self, text: str) -> None:
        self.text = text

    def read_bytes(self) -> bytes:
        return self.text.encode()


@pytest.mark.parametrize("change", [elsewhere, other_code])
def test_a_measurement_of_another_machine_or_other_code_is_not_shown(
    change: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, before = run_plan(plan, "")
    made = stamps(plan.folder)
    record = json.loads((plan.folder / TIMING).read_text())
    assert record["made_by"].keys() >= {"processor", "device", "threads", "torch", "code", "repeats", "photographs"}
    assert before.latency_ms == record["latency_ms"]
    _, again = run_plan(replace(plan, repeats=0), "")
    assert (again.latency_ms, again.hardware, again.versions) == (before.latency_ms, before.hardware, before.versions)
    unchanged = stamps(plan.folder)
    assert {name for name in made if made[name] != unchanged[name]} == {"scores.json"}
    change(monkeypatch)
    capsys.readouterr()
    dense_shown, shown = run_plan(replace(plan, repeats=0), "")
    assert shown.latency_ms is shown.speedup is shown.peak_memory_gib is None
    assert (shown.hardware, shown.versions) != (before.hardware, before.versions)
    assert shown.scores == {name: value for name, value in before.scores.items() if name not in TIMES}
    assert (dense.is_timed, dense_shown.is_timed) == (True, False)
    assert not (plan.folder / TIMING).exists()
    remade = {name for name, stamp in stamps(plan.folder).items() if stamp != made.get(name)}
    assert remade == {"seed000000000.safetensors", LAYERS, "scores.json"}
    what = "processor was" if change is elsewhere else "code was"
    assert f"seed000000000 was predicted again: {what} " in capsys.readouterr().err
    _, anew = run_plan(plan, "")
    assert anew.latency_ms is not None
    assert json.loads((plan.folder / TIMING).read_text())["made_by"] != record["made_by"]


def test_a_timing_is_of_these_images_and_repeats(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure = evaluation.measure
    monkeypatch.setattr(
        evaluation, "measure", lambda *a, **options: measured.append(options["repeats"]) or measure(*a, **options)
    )
    found = score(plan, predict(plan))
    assert found.first is not None
    first = timing(plan, found.first)
    assert first["sitting"] == made_by.sitting()
    made_by.sitting.cache_clear()  # another process
    assert timing(plan, found.first) == first
    assert first["sitting"] != made_by.sitting()
    assert row(plan, found, first, "").sitting == first["sitting"]
    assert timing(replace(plan, repeats=0), found.first)["latency_ms"] == first["latency_ms"]
    timing(replace(plan, repeats=6), found.first)
    other = replace(found.first, name="another")
    assert timing(replace(plan, repeats=0), other) is None
    assert measured == [5, 6]


def test_scores_that_were_predicted_elsewhere_say_where(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring alone takes predictions made elsewhere; the row is labelled with who made them, and who timed."""
    for _ in predict(plan):
        pass
    there = in_words(made_by.made_by("cpu"))
    elsewhere(monkeypatch)

    def no_model(self: Predictor, job: Job) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__init__", no_model)
        found = score(plan)
    assert row(plan, found, None, "").hardware == there
    timed = timing(plan, found.first)
    here = row(plan, found, timed, "").hardware
    assert here.startswith(f"{there}; timed on ")
    assert "another CPU" in here


def test_scoring_what_is_not_predicted_says_so(plan: Plan) -> None:
    with pytest.raises(UserError, match="seed000000000: not predicted yet"):
        score(plan)


def test_totals_are_made_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    totals = runner.totals
    monkeypatch.setattr(runner, "totals", lambda *a: calls.append(1) or totals(*a))
    source = Source("synthetic", frames=2, scenes=3, options={"size": [28, 28]})
    seen = []
    plan = plan_of(Job(str(checkpoint), resize=False), source, Protocol(points=None), tmp_path / "run")
    found = score(plan, predict(plan), progress=lambda scene, scores: seen.append((scene.name, scores.name)))
    assert (len(found.scenes), calls) == (3, [1])
    assert seen == [(scene.name, scene.name) for scene in found.scenes]


def test_the_bar_shows_the_mean_so_far(plan: Plan) -> None:
    rows = evaluate(plan.job, plan.source, plan.protocol, plan.folder, with_fidelity=True).scenes
    with evaluation.Bar(plan) as bar:
        bar.advance(None, None)
        assert bar.bar.postfix == "no scores yet"
        for value in (0.25, 0.75):
            bar.advance(None, replace(rows[0], values={"auc_30": value}))
        assert bar.bar.postfix == "mean AUC@30 0.500"


SCRIPT = """
import sys
from pathlib import Path
import geoaccel
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import predict, score
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.source import Source
assert Path(geoaccel.__file__).is_relative_to(sys.argv[1]), geoaccel.__file__
source = Source("synthetic", frames=2, scenes=1, options={"size": [28, 28]})
job = Job(sys.argv[2], merging={"fastvggt": {"ratio": 0.5, "bypass": False}}, resize=False)
plan = Plan(job, source, Protocol(points=None), Path(sys.argv[3]))
score(plan, predict(plan, renewed=print))
"""


def test_predictions_go_when_the_source_of_a_method_is_edited(checkpoint: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder, place in {"geoaccel": ".", "models": "models", "eval": "eval", "configs": "configs"}.items():
        ignored = shutil.ignore_patterns("*.png", "*.md", "__pycache__", "checkpoints")
        shutil.copytree(ROOT / folder, tree / "geoaccel" / place, ignore=ignored, dirs_exist_ok=True)
    (tree / "geoaccel" / "models" / "checkpoints").mkdir()
    run = tmp_path / "run"

    def evaluated() -> tuple[str, str, int]:
        command = [sys.executable, "-c", SCRIPT, str(tree), str(checkpoint), str(run)]
        done = subprocess.run(command, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, cwd=tree)
        assert done.returncode == 0, done.stderr
        (path,) = (run / "predictions").iterdir()
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
        return done.stdout, notes["made_by"]["code"], path.stat().st_mtime_ns

    first = evaluated()
    page = tree / "geoaccel" / "eval" / "report" / "page.py"
    page.write_text(page.read_text() + "# a comment\n")
    assert evaluated() == first
    method = tree / "geoaccel" / "merging" / "fastvggt.py"
    method.write_text(method.read_text() + "\nEDITED = True\n")
    said, code, stamp = evaluated()
    assert stamp != first[2]
    assert said == f"seed000000000 was predicted again: code was '{first[1]}', is now '{code}'\n"
