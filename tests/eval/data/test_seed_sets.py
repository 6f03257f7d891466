"""Three disjoint sets of scenes, and whatever trains, calibrates or chooses keeps off the report set."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from tiny_checkpoint import write_checkpoint

from geoaccel import cli
from geoaccel.errors import run_program
from geoaccel.eval.data import calibration, synthetic
from geoaccel.eval.data.synthetic import REPORT_SEEDS, SEED_SETS, checked_seeds, set_of
from geoaccel.eval.tools import ablation
from geoaccel.eval.tools.command import make_plans, swept_knobs
from geoaccel.tuned import TunedPlan

ROOT = Path(__file__).parents[3]
# Sources that render scenes by their seeds. Those that choose by what they see have to ask `checked_seeds`, or to take
# their scenes from `rendered_clip` or `CalibrationScenes`, which do. Whoever adds one says here what it does.
CHOOSES = {
    *("eval/data/calibration.py", "eval/tools/ablation.py", "eval/tools/quantize.py"),
    *("scripts/training/curriculum.py", "scripts/training/train_confidence.py", "scripts/training/train_mini.py"),
}
SHOWS = {
    *("eval/data/co3d_layout.py", "eval/data/long_paths.py", "eval/data/synthetic_scenes.py", "eval/run/source.py"),
    *("eval/bench/bench.py", "eval/bench/merge3d.py", "eval/tools/demo.py"),
}


def test_the_sets_are_disjoint() -> None:
    assert list(REPORT_SEEDS) == list(range(8192, 8256))
    for seed, name in ((0, "validation"), (63, "validation"), (1000, "validation"), (1031, "validation")):
        assert set_of(seed) == name
    for seed, name in ((8191, "validation"), (8192, "report"), (8255, "report"), (8256, "validation")):
        assert set_of(seed) == name
    assert (set_of(999_999), set_of(1_000_000), set_of(2**62)) == ("validation", "training", "training")
    for name, (_, seeds) in SEED_SETS.items():
        assert {set_of(seed) for seed in seeds or ()} <= {name}
    assert {len(seeds) for _, seeds in SEED_SETS.values() if seeds} == {64}
    assert {set_of(seed) for seed in synthetic.VALIDATION_SEEDS} == {"validation"}


@pytest.mark.parametrize("seed", [8192, 8255])
def test_a_seed_of_the_report_set_is_one_clear_line(seed: int) -> None:
    for allowed in (["training"], ["validation"], ["training", "validation"]):
        with pytest.raises(ValueError, match=f"cannot train on seed {seed}: it is in the report set") as caught:
            checked_seeds([1_000_000, seed] if "training" in allowed else [seed], "train on", *allowed)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert checked_seeds(range(8192, 8194), "report", "report") == [8192, 8193]


def test_every_source_that_renders_says_whether_it_chooses() -> None:
    renders = re.compile(r"eval\.data\.synthetic import|import .*\b(rendered_clip|CalibrationScenes)\b")
    guards = re.compile(r"\b(checked_seeds|rendered_clip|CalibrationScenes)\(")
    found = set()
    for folder in ("eval", "scripts/training", "geoaccel"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if renders.search(path.read_text()):
                found.add(name)
                assert name not in CHOOSES or guards.search(path.read_text()), f"{name} chooses unguarded"
    assert found == CHOOSES | SHOWS


def refused(work: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a program ends, exit code 2."""
    code = work()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error" in line or "cannot" in line or "is for choosing" in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert "report set" in lines[0]
    assert not re.search("Traceback", err)
    return lines[0]


@pytest.mark.parametrize("action", ["calibrate", "sensitivity"])
@pytest.mark.parametrize("first", [8192, 8250, 8255])
def test_quantize_keeps_off_the_report_set(
    action: str, first: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("a.safetensors" if action == "calibrate" else "a.json")
    options = ["--model", "vggt-mini", "--quantization", "w4a16", "--out", str(out), "--first-seed", str(first)]
    said = refused(lambda: cli.main(["quantize", action, *options]), capsys)
    assert f"cannot calibrate on seed {first}" in said
    assert not list(tmp_path.iterdir())


def test_clips_are_never_of_the_report_set() -> None:
    with pytest.raises(ValueError, match="cannot calibrate or choose on seed 8200"):
        calibration.rendered_clip(8200, 2, (28, 28))
    assert calibration.rendered_clip(8191, 2, (28, 28)).name == "seed8191"


def test_the_ablation_is_not_judged_by_the_report_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "TEST_SEEDS", REPORT_SEEDS)
    model: Any = torch.nn.Module()
    model.preprocess = type("P", (), {"size": 28})
    with pytest.raises(ValueError, match="seed 8192: it is in the report set"):
        ablation.run_ablation(model, ablation.Ablation(scenes=1))


def recipe(name: str, *overrides: str) -> Any:
    with initialize_config_module("geoaccel.configs", version_base="1.3"):
        return compose(name, overrides=list(overrides))


def test_training_keeps_off_the_report_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its scenes, and those that judge weights meanwhile."""
    curriculum, train_mini = (importlib.import_module(name) for name in ("curriculum", "train_mini"))
    cfg = recipe("train", f"out={tmp_path}", "compile=false")
    monkeypatch.setattr(curriculum, "FIRST_TRAIN_SEED", REPORT_SEEDS[0])
    cpu = torch.device("cpu")
    said = refused(lambda: run_program("train", lambda: curriculum.sample(cfg, 0, cpu)), capsys)
    assert "cannot train on seed 8192" in said
    monkeypatch.setattr(train_mini, "VALIDATION_SEEDS", REPORT_SEEDS)
    run = type("Run", (), {"averaged": lambda self: None, "cfg": cfg})()
    said = refused(lambda: run_program("train", lambda: train_mini.validate(run)), capsys)
    assert "cannot choose weights by seed 8192" in said


def test_predictors_keep_off_the_report_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("train_confidence")
    cfg = recipe("confidence", "model=vggt-mini")
    model: Any = None
    learn, judge = script.scenes(cfg, model)
    assert ({set_of(seed) for seed in learn}, {set_of(seed) for seed in judge}) == ({"training"}, {"validation"})
    monkeypatch.setattr(script, "VALIDATION_SEEDS", REPORT_SEEDS)
    said = refused(lambda: run_program("train_confidence", lambda: script.scenes(cfg, model)), capsys)
    assert "cannot judge predictors by seed 8192" in said
    monkeypatch.setattr(script, "FIRST_TRAIN_SEED", REPORT_SEEDS[0] - 1000 * 1_000_000_000)
    said = refused(lambda: run_program("train_confidence", lambda: script.scenes(cfg, model)), capsys)
    assert "cannot train on seed 8192" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["--multirun", "merging=httm", "ratio=0.3,0.6"],
        ["--multirun", "merging=httm", "merging.httm.query_keep=0.2,0.4"],
        ["--config", "ablation"],
    ],
)
def test_knobs_are_not_swept_on_the_report_set(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(lambda: cli.main(["eval", *overrides, "data.split=report"]), capsys)
    assert "nothing may be chosen on the report set" in said
    assert ("ratio" in said) != ("merging.httm.query_keep" in said)


@pytest.mark.parametrize("swept", ["layers", "plan"])
def test_layers_and_plans_are_not_chosen_by_the_report_set(
    swept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geoaccel.eval.tools.command.run_plan", lambda *_: pytest.fail("it ran"))
    values = ["{0:{asymmetric:{stride:2}}}", "{0:{asymmetric:{stride:4}}}"]
    if swept == "plan":
        values = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
        for value in values:
            TunedPlan({"linears": "0", "rest": "0"}).write(value, 4)
    report = "data.split=report"
    said = refused(lambda: cli.main(["eval", "--multirun", f"{swept}={','.join(values)}", report]), capsys)
    assert f"a sweep over {swept} is for choosing, and nothing may be chosen on the report set" in said
    for side in (values[:1], ["null", values[0]]):  # alone, or beside the dense model
        assert len(make_plans("eval", "eval", [f"{swept}={','.join(side)}", report])) == len(side)
    assert len(make_plans("eval", "eval", [f"{swept}={','.join(values)}"])) == 2


def test_methods_and_frames_may_be_reported_side_by_side() -> None:
    overrides = ["merging=none,httm", "data.frames=8,16", "data.split=report"]
    assert len(make_plans("eval", "eval", overrides)) == 4
    assert swept_knobs([["a=1", "ratio=0.3"], ["a=2", "ratio=0.3"]]) == []
    assert swept_knobs([["+merging.httm.anchor=true"], ["+merging.httm.anchor=false"]]) == ["merging.httm.anchor"]
    assert swept_knobs([overrides]) == []


@pytest.mark.parametrize(("split", "folder"), [("validation", "synthetic"), ("report", "synthetic-report")])
def test_a_report_says_which_set_it_is_of(
    split: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    checkpoint = write_checkpoint("vggt", tmp_path)
    options = ["data.scenes=1", "data.frames=2", "data.options.size=[28,28]", f"model={checkpoint}", "timing.repeats=0"]
    assert cli.main(["eval", *options, *([f"data.split={split}"] if split == "report" else [])]) == 0
    assert f"{split} scenes" in capsys.readouterr().err
    (run,) = (tmp_path / "runs" / "eval").iterdir()
    assert run.name.startswith(f"{folder}-{checkpoint.stem}")
    text = (run / "report.md").read_text()
    assert f"on synthetic, {split} scenes" in text.splitlines()[0]
    assert f", {split} scenes" in next(line for line in text.splitlines() if line.startswith("- protocol:"))
    (row,) = json.loads((run / "report.json").read_text())["rows"]
    assert row["per_scene"][0]["scene"] == ("seed000008192" if split == "report" else "seed000000000")
