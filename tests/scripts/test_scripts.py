"""Scripts that measure: they run, say what they were given, and refuse what they cannot use."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def load() -> Iterator[object]:
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, next(SCRIPTS.rglob(f"{name}.py")))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    try:
        module.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("measure_merging", ["frame=3"], "unknown setting 'frame'"),
        ("measure_merging", ["variants=htttm"], "variants=htttm: none begins so"),
        ("measure_merging", ["model=vgt-mini", "variants=dense"], "Did you mean 'vggt-mini'"),
        ("train_mini", ["init_from=vgt-mini", "out=here"], "train_mini: unknown model 'vgt-mini'"),
        ("matching_share", ["methods=come"], "methods=come: it merges the token stream"),
        ("matching_share", ["methods=htttm"], "unknown merging method 'htttm'"),
    ],
)
def test_wrong_input_is_one_line(
    script: str,
    arguments: list[str],
    message: str,
    load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(load(script), monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_what_merging_costs(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("frames=3", "scenes=2", "variants=httm", "first=2", f"out={tmp_path}", "device=cpu")
    assert run(load("measure_merging"), monkeypatch, *settings) == 0, capsys.readouterr().err
    folder = tmp_path / "vggt-mini-3frames"
    rows = {row["variant"]: row for row in json.loads((folder / "differences.json").read_text())["rows"]}
    assert list(rows) == ["dense", "httm", "httm, no outlier filter"]
    assert rows["dense"]["effective_ratio"] is None
    assert all(effect["mean"] == 0 for effect in rows["dense"]["effects"].values())
    assert rows["httm"]["effective_ratio"] > 0.5
    for variant in ("httm", "httm, no outlier filter"):
        found = {name: effect["mean"] for name, effect in rows[variant]["effects"].items()}
        assert found["auc_30_loss"] == pytest.approx(rows["dense"]["auc_30"] - rows[variant]["auc_30"], abs=2e-4)
        rise = rows[variant]["depth_abs_rel"] - rows["dense"]["depth_abs_rel"]
        assert found["depth_abs_rel_rise"] == pytest.approx(rise, abs=2e-4)
        assert found["pose_deg"] > 0.1
        assert found["depth_rel"] > 1e-3
    assert "minus" not in rows["httm"]
    minus = rows["httm, no outlier filter"]["minus"]["httm"]
    for name, effect in minus.items():
        means = [rows[variant]["effects"][name]["mean"] for variant in ("httm, no outlier filter", "httm")]
        assert effect["mean"] == pytest.approx(means[0] - means[1], abs=1e-9)
        assert effect["low"] <= effect["mean"] <= effect["high"]
    assert minus["pose_deg"]["mean"] != 0
    for variant in rows:
        document = json.loads((folder / variant.replace(", ", "-").replace(" ", "-") / "scores.json").read_text())
        assert document["scores"]["auc_30"] == pytest.approx(rows[variant]["auc_30"], abs=1e-4)
        assert document["scores"]["depth_abs_rel"] == pytest.approx(rows[variant]["depth_abs_rel"], abs=1e-4)
        assert "chamfer" not in document["scores"]


def test_what_was_measured_of_merging_is_kept(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("measure_merging")
    folder = tmp_path / "vggt-mini-2frames"
    asked: list[str] = []
    run_plan = module.run_plan
    monkeypatch.setattr(module, "run_plan", lambda plan, command: asked.append(plan.folder.name) or run_plan(plan, ""))

    def measure(scenes: int, variants: str) -> dict[str, dict[str, Any]]:
        asked.clear()
        settings = (f"scenes={scenes}", f"variants={variants}", "first=1", "frames=2", f"out={tmp_path}", "device=cpu")
        assert run(module, monkeypatch, *settings) == 0
        return {row["variant"]: row for row in json.loads((folder / "differences.json").read_text())["rows"]}

    once = measure(1, "httm")
    assert asked == ["dense", "httm"]
    assert len([*(folder / "dense" / "predictions").iterdir()]) == 1
    assert not [*(folder / "httm" / "predictions").iterdir()]
    assert measure(1, "httm") == once
    assert asked == []
    (prediction,) = (folder / "dense" / "predictions").iterdir()
    prediction.unlink()
    both = measure(1, "httm, no outlier filter")
    assert asked == ["dense", "httm-no-outlier-filter"]
    twice = measure(2, "httm")
    assert asked == ["dense", "httm"]
    assert [row["scenes"] for row in twice.values()] == [2, 2, 1]
    assert twice["httm"]["effects"] != once["httm"]["effects"] == both["httm"]["effects"]
    # An ablation is compared on the scenes that its method was measured on, too.
    assert twice["httm, no outlier filter"] == both["httm, no outlier filter"]
    # Side by side in the report stand only those of the same scenes.
    assert [row["merging"] for row in json.loads((folder / "report.json").read_text())["rows"]] == ["none", "httm"]
    assert measure(1, "httm, no outlier filter") == twice
    assert [row["merging"] for row in json.loads((folder / "report.json").read_text())["rows"]] == ["none"]
    # What another machine measured is measured anew, and is no row beside what this one measured.
    monkeypatch.setattr(sys.modules[module.hardware.__module__], "processor", lambda: "another CPU")
    assert list(measure(1, "httm")) == ["dense", "httm"]
    assert asked == ["dense", "httm"]
    (folder / "httm" / "config.json").write_text(json.dumps({"weights": "others"}))
    assert run(module, monkeypatch, "variants=httm", "first=1", "frames=2", "scenes=1", f"out={tmp_path}") == 2


def test_matching_share(load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("matching_share")
    monkeypatch.setattr(module.KERNELS, "_entries", dict(module.KERNELS._entries))
    assert run(module, monkeypatch, "frames=2", "methods=httm,fastvggt", "repeats=1", "device=cpu") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == ["httm", "fastvggt"]
    for row in rows:
        assert row["tokens"] == 2 * 261
        assert 0 < row["attention_s"] < row["dense_attention_s"] * 1.5
        assert row["matching_and_aggregation_s"] > 0


def test_a_trial_does_not_replace_the_predictor_of_the_package(load) -> None:
    from geoaccel.merging.confidence import SHIPPED

    train = load("train_confidence")
    where = {
        out: train.destination(OmegaConf.create({"model": "vggt-mini", "out": out})) for out in (None, "a/b", "shipped")
    }
    assert where == {
        None: Path("vggt-mini-come.safetensors"),
        "a/b": Path("a/b"),
        "shipped": SHIPPED / "vggt-mini.safetensors",
    }
    with pytest.raises(ValueError, match="out=shipped is for the models of the package"):
        train.destination(OmegaConf.create({"model": "mine.safetensors", "out": "shipped"}))


def test_hidden_files_are_no_images(load, tmp_path: Path) -> None:
    train = load("train_confidence")
    for name in ("a/0.jpg", "a/1.jpg", "a/._0.jpg", "b/0.jpg", "b/1.jpg", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    learn, judge = train.scenes(OmegaConf.create({"images": str(tmp_path), "frames": 4}), None)
    assert [[path.name for path in clip] for clip in learn + judge] == [["0.jpg", "1.jpg"]] * 2


def test_every_script_ends_as_the_command_line_does(
    load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is run by hand goes through one function, and a fault of ours shows its traceback there too."""
    texts = {path.stem: path.read_text() for path in SCRIPTS.rglob("*.py")}
    programs = {name for name, text in texts.items() if "__main__" in text and "\nfrom geoaccel" in text}
    assert len(programs) > 8
    assert "return run_program(name, " in texts["command_settings"]
    ends = {name: (f'run_program("{name}", ', f'run_with_settings("{name}", ') for name in programs}
    assert {name for name in programs if not any(end in texts[name] for end in ends[name])} == set()

    def broken(*given: Any, **options: Any) -> None:
        raise TypeError("planted")

    module = load("measure_merging")
    monkeypatch.setattr(module, "measure", broken)
    assert run(module, monkeypatch) == 1
    err = capsys.readouterr().err
    assert "TypeError: planted" in err
    assert err.splitlines()[-1].startswith("measure_merging: this is an error of geoaccel")
