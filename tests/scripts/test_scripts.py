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
        ("measure_frames", ["measure", "vgt-mini"], "Did you mean 'vggt-mini'"),
        ("measure_frames", ["summary"], "no measurements yet"),
        ("measure_layers", ["vgt-mini", "--out", "layers.json"], "Did you mean 'vggt-mini'"),
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
    with pytest.raises(ValueError, match="out=shipped is only for the models of the package"):
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

    module = load("measure_frames")
    monkeypatch.setattr(module, "measure", broken)
    assert run(module, monkeypatch, "measure", "vggt-mini") == 1
    err = capsys.readouterr().err
    assert "TypeError: planted" in err
    assert err.splitlines()[-1].startswith("measure_frames: this is a bug in geoaccel")
