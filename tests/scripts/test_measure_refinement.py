"""The script that measures bundle adjustment: goes on where it ended, counts, and the document shows what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import measure_refinement
from geoaccel.eval.metrics.effects import with_interval
from geoaccel.reconstruction import Reconstruction

ROOT = Path(__file__).resolve().parents[2]


def test_a_scene_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("pycolmap")
    monkeypatch.setattr(measure_refinement, "FRAMES", 4)
    monkeypatch.setattr(measure_refinement, "SIZE", 112)

    def tracks(scene: Reconstruction) -> Any:
        found = measure_refinement.exact_tracks(measure_refinement.rendered(1003, frames=4, size=112))
        return replace(found, pixels=found.pixels + np.random.default_rng(0).normal(0, 0.05, found.pixels.shape))

    monkeypatch.setattr(measure_refinement, "measure_tracks", tracks)
    arguments = ["--seeds", "1003", "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    measure_refinement.main(arguments)
    document = json.loads((tmp_path / "out.json").read_text())
    row = document["rows"][0]
    assert row["before"] < row["after"] <= row["exact"] == 1
    assert row["tracks"] >= row["of_3_views"] > 16
    assert json.loads(capsys.readouterr().out) == document["auc_5"]
    monkeypatch.setattr(measure_refinement, "rendered", None)
    measure_refinement.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == document["rows"]


def test_scenes_that_were_made_worse_are_counted() -> None:
    rows = [
        {"before": 0.5, "after": 0.9, "exact": 1.0, "said": "bundle adjustment: error 3 to 1 pixels"},
        {"before": 0.5, "after": 0.4, "exact": 1.0, "said": "bundle adjustment: error 3 to 1 pixels"},
        {"before": 0.5, "after": 0.5, "exact": 1.0, "said": "bundle adjustment changed nothing: too few"},
    ]
    found = measure_refinement.summary(rows)
    assert {name: found[name] for name in ("scenes", "worse", "refused")} == {"scenes": 3, "worse": 1, "refused": 1}
    assert found["before"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["after"]["mean"] == pytest.approx(0.6)
    assert found["after"]["low"] < 0.6 < found["after"]["high"]


def test_what_was_measured_holds_and_is_shown() -> None:
    shown = " ".join((ROOT / "docs" / "outputs.md").read_text().split())
    for name, first in (("rendered", 1000), ("report", 8192)):
        document = json.loads((ROOT / "benchmarks" / f"refinement-{name}.json").read_text())
        found = document["auc_5"]
        assert found == measure_refinement.summary(document["rows"])
        assert [row["seed"] for row in document["rows"]] == list(range(first, first + 32))
        cells = [str(first), *(with_interval(found[kind], ".3f") for kind in ("before", "after", "exact"))]
        assert f"{' | '.join(cells)} | {found['worse']} | {found['refused']} |" in shown
        if name == "rendered":  # the aim
            assert found["worse"] == 0
            assert found["exact"]["mean"] - found["after"]["mean"] < 0.02
