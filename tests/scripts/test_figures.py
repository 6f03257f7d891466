"""Scripts that measure figures and write tables of them; `make docs-check` looks whether documents show these."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import merging_tables
import table_parts
from geoaccel.eval.data import synthetic_scenes
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.data.synthetic import SceneBatch
from geoaccel.eval.run.source import Kept, Source
from geoaccel.models.files import fingerprint
from merging_variants import chosen

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vggt-mini", "pi3-mini")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "figures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("mini_tables")


def test_a_loss_is_shown_as_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = {
        "auc_30_loss": {"mean": 0.02, "low": -0.01, "high": 0.03},
        "auc_5_loss": {"mean": 0.04, "low": -0.02, "high": 0.05},
        "depth_abs_rel_rise": {"mean": 0.005, "low": -0.001, "high": 0.009},
    }
    merged, ablated = merging_tables.MERGED, merging_tables.ABLATED
    rows = [
        {"variant": "dense", "auc_30": 0.8, "depth_abs_rel": 0.05, "effective_ratio": None, "effects": effects},
        *(
            {"variant": name, "scenes": 16, "effective_ratio": 0.5, "effects": effects, "minus": {"x": effects}}
            for name in merged
        ),
        *({"variant": v, "scenes": 16, "minus": {"x": effects}} for v in ablated if v not in merged),
    ]
    for model in MODELS:
        (tmp_path / f"merging-{model}-64frames.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(table_parts, "BENCHMARKS", tmp_path)
    header, _, first, *_ = merging_tables.merged()
    assert "| `vggt-mini`, AUC@30 of 0.800 | AUC@5 | AbsRel of 0.0500 | `pi3-mini`, AUC@30 of 0.800 |" in header
    loss, strict, depth = "-0.020 (-0.030 to +0.010)", "-0.040 (-0.050 to +0.020)", "+0.0050 (-0.0010 to +0.0090)"
    cells = f"{loss} | {strict} | {depth}"
    assert first == f"| `httm` | 50 % | {cells} | {cells} |"
    cells = f"{loss} | {depth}"
    # What is not measured of both models yet has no row.
    without = [row for row in rows if row["variant"] != "come"]
    (tmp_path / "merging-pi3-mini-64frames.json").write_text(json.dumps({"rows": without}))
    assert [line for line in merging_tables.merged() if line.startswith("| `come` |")] == []
    header, _, first, *_ = merging_tables.ablated()
    assert header == "| | scenes | `vggt-mini`, AUC@30 | AbsRel | `pi3-mini`, AUC@30 | AbsRel |"
    assert first == f"| `httm` without its outlier filter | 16 | {cells} | {cells} |"


def test_measuring_anew_fills_the_tables(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script("measure_mini")
    asked: list[tuple[str, ...]] = []

    def run(*command: str) -> str:
        asked.append(command)
        if "summary" in command:
            folder = Path(command[-1]) / "benchmarks"
            folder.mkdir(parents=True, exist_ok=True)
            which = command[command.index("--set") + 1]
            found = {"weights": fingerprint("vggt-mini"), "frames": {"64": [{"variant": "dense", "auc_30": 0.6}]}}
            (folder / f"merging-vggt-mini-frames-{which}.json").write_text(json.dumps(found))
        return ""

    evaluated: list[dict[str, str]] = []

    def evaluate(overrides: list[str], kept: object) -> dict[str, float | None]:
        given = dict(setting.split("=", 1) for setting in overrides)
        evaluated.append(given)
        value = {"fp8": 0.25}.get(given.get("quantization", ""), 0.5) - int(given.get("data.frames", 0)) / 1000
        scored = dict.fromkeys([key for _, key, _, _ in tables.SCORES], value)
        return {**scored, "x": None}

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(measure, "evaluate", evaluate)
    monkeypatch.setattr(measure, "BENCHMARKS", tmp_path)
    measure.predictor("vggt-mini", tmp_path)
    measure.predictor("vggt-mini", tmp_path)
    assert [command[1:] for command in asked] == [
        ("scripts/training/train_confidence.py", "model=vggt-mini", "out=shipped")
    ]
    measure.scores("vggt-mini", tmp_path)
    measure.merging("vggt-mini", tmp_path)
    # What aims hang on is measured on all test scenes, the rest on some.
    given = [command for command in asked if "measure" in command]
    assert [command[command.index("--frames") + 1] for command in given] == ["64:64", "64:16"]
    everywhere, somewhere = (
        set(chosen(list(command[command.index("--variants") + 1 : command.index("--set")]))) for command in given
    )
    assert {*merging_tables.MERGED, "litevggt, released choice", "alike, random groups"} <= everywhere
    assert {*merging_tables.MERGED, *merging_tables.ABLATED} <= everywhere | somewhere
    measure.quantization("vggt-mini", tmp_path)
    written = [
        command[command.index("--out") + 1]
        for command in asked
        if "scripts/figures/quantization_ablation.py" in command
    ]
    assert written == [str(tmp_path / f"quantization-vggt-mini{kind}") for kind in ("", "-five-sets")]
    assert len({given["out"] for given in evaluated}) == len(measure.SCORED)
    monkeypatch.setattr(table_parts, "BENCHMARKS", tmp_path)
    for module in (tables, merging_tables, table_parts):
        monkeypatch.setattr(module, "MODELS", ("vggt-mini",))
    assert "| pose AUC@30 | 0.500 | >= 0.80 |" in tables.card("vggt-mini")
    frames = "| AUC@30 at 32 / 64 frames | 0.468 / 0.600 | within 0.05 of 8 frames |"
    assert {"| pose AUC@30 | 0.500 | >= 0.80 |", frames} <= set(tables.scored())
    assert "| `vggt-mini`, `fp8` | -0.250 | -0.250 | -50.0 % |" in tables.quantized()
    for name in ("scores-vggt-mini", "merging-vggt-mini-64frames"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["weights"] == fingerprint("vggt-mini")


def test_a_scene_is_rendered_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script("measure_mini")
    read, given = [], Source.__call__

    def count(self: Source) -> Iterator[EvalScene]:
        for scene in given(self):
            read.append(scene.name)
            yield scene

    rendered, render = [], synthetic_scenes.sequence

    def count_rendered(seed: int, **options: Any) -> SceneBatch:
        rendered.append(seed)
        return render(seed, **options)

    monkeypatch.setattr(Source, "__call__", count)
    monkeypatch.setattr(synthetic_scenes, "sequence", count_rendered)
    synthetic_scenes._rendered.cache_clear()
    kept: dict[str, Kept] = {}
    common = ["data=synthetic", "model=vggt-mini", "timing.repeats=0", "data.frames=2", "device=cpu"]
    common += ["data.protocol.points=null", "data.options.size=[28,28]"]
    rows = [
        measure.evaluate([*common, "data.scenes=2", f"out={tmp_path / 'dense'}"], kept),
        measure.evaluate([*common, "data.scenes=2", "control=frame-only", f"out={tmp_path / 'alone'}"], kept),
    ]
    assert (len(read), rendered) == (2, [0, 1])
    measure.evaluate([*common, "data.scenes=1", f"out={tmp_path / 'one'}"], kept)
    assert len(read) == 3
    assert [row["scenes"] for row in rows] == [2, 2]
    assert rows[0]["rotation_median_deg"] != rows[1]["rotation_median_deg"]
    # What one reader does to its pixels is nothing to the next.
    frame = next(iter(next(iter(kept.values()))())).frames[0]
    frame.image().zero_()
    assert frame.image().any()
